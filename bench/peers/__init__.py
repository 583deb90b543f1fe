"""Other engines, measured beside ours in the same sweep and recorded in the same form."""
