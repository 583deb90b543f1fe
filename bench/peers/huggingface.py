"""`transformers`, in bfloat16: the model as it is published, run eagerly with its own cache."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.plan import DECODE, PREFILL, SEED, Case
from bench.published import PUBLISHED, SMALL, published

# A longer prompt goes into the cache in such pieces where it is not what is measured.
_CHUNK = 2048


class Transformers:
    """`transformers` as a `bench.processes.Engine`."""

    def __init__(self, model: str, samples: int) -> None:
        """Random weights for the name of an architecture, a Hugging Face checkpoint's own for anything else.

        Raises:
          RuntimeError: torch or transformers is not installed.
          ValueError, OSError: there is no such checkpoint, or it is not in Hugging Face's layout.
        """
        try:
            import torch
            import transformers
        except ImportError as error:
            raise RuntimeError(
                f"{error.name} is not installed: --transformers needs torch and transformers >= 5.23"
            ) from None
        self._torch, self.samples = torch, samples
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._model = self._load(model).eval()

    def _load(self, model: str) -> Any:
        from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

        torch = self._torch
        if model not in (*PUBLISHED, *SMALL):
            from convert import hub  # Orbax is slow to import
            from gemma_jax.checkpoints import resolve

            folder = Path(hub.resolve(resolve(model)))
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map=self._device
            )
        config = Gemma4TextConfig(**published(model).to_hf())
        torch.manual_seed(SEED)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self._device):
                return Gemma4ForCausalLM(config)
        finally:
            torch.set_default_dtype(default)

    def close(self) -> None:
        """Nothing outlives the process."""

    def measure(self, case: Case) -> dict[str, Any]:
        """Warms up and times one case.

        Raises anything that torch does; out of memory, most likely.
        """
        gc.collect()
        cuda = self._device == "cuda"
        if cuda:
            self._torch.cuda.empty_cache()
            self._torch.cuda.reset_peak_memory_stats()
        run = {DECODE: self._decode, PREFILL: self._prefill}.get(case.phase, self._first_token)
        with self._torch.inference_mode():
            run(case)
            seconds = [run(case) for _ in range(self.samples)]
        return {
            "seconds": seconds,
            "peak_bytes": self._torch.cuda.max_memory_allocated() if cuda else None,
            "peak_bytes_of": "max_memory_allocated of torch" if cuda else None,
            "weight_bytes": sum(p.numel() * p.element_size() for p in self._model.parameters()),
            "activations": "bfloat16",
            "peer": self._versions,
        }

    def _prefill(self, case: Case) -> float:
        tokens = self._tokens(case.batch, case.tokens or 0)
        return self._timed(lambda: self._forward(tokens))

    def _first_token(self, case: Case) -> float:
        assert case.tokens is not None
        rng = np.random.default_rng(SEED)
        ids = rng.integers(0, self._model.config.vocab_size, (case.batch, case.tokens))

        def run() -> Any:
            tokens = self._torch.from_numpy(ids).to(self._device)
            return self._forward(tokens).logits[:, -1].argmax(-1).cpu()

        return self._timed(run)

    def _decode(self, case: Case) -> float:
        assert case.depth is not None
        assert case.new_tokens is not None
        new_tokens = case.new_tokens
        tokens = self._tokens(case.batch, case.depth)
        cache = None
        for begin in range(0, case.depth, _CHUNK):
            out = self._forward(tokens[:, begin : begin + _CHUNK], cache)
            cache = out.past_key_values
        token = out.logits[:, -1:].argmax(-1)

        def run() -> Any:
            nonlocal token, cache
            for _ in range(new_tokens):
                out = self._forward(token, cache)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            return token

        return self._timed(run)

    def _tokens(self, batch: int, length: int) -> Any:
        generator = self._torch.Generator().manual_seed(SEED)
        vocabulary = self._model.config.vocab_size
        ids = self._torch.randint(0, vocabulary, (batch, length), generator=generator)
        return ids.to(self._device)

    def _forward(self, tokens: Any, cache: Any = None) -> Any:
        return self._model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        )

    def _timed(self, run: Callable[[], Any]) -> float:
        self._wait()
        begin = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()
