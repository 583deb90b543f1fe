"""Where compiled programs are kept, when JAX is told so, and that a second process finds them."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gemma_jax import compilation_cache

ROOT = Path(__file__).parents[2]
SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")

# Prints how many of its programs JAX found on the disk; keeps even those that compile in no time.
PROGRAM = """
import jax, jax.numpy as jnp
from gemma_jax import compilation_cache

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
compilation_cache.enable()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """JAX without a folder for compiled programs, and a user whose caches are in `tmp_path`."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_go_into_the_cache_folder_of_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "caches" / "gemma-jax"
    assert compilation_cache.enable() == folder
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o077 == 0, "what is kept there is run: others must not write"


@pytest.mark.parametrize("value", ["", "relative/caches"])
def test_a_cache_home_that_is_no_absolute_path_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.default_folder() == tmp_path / ".cache" / "gemma-jax"


def test_a_folder_that_the_user_has_chosen_stays(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    assert compilation_cache.enable() == compilation_cache.enable(tmp_path / "other") == chosen
    assert jax.config.jax_compilation_cache_dir == str(chosen)
    assert not (tmp_path / "caches").exists()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("a file where the folder should be")
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Permissions do not bind root, as whom tests may run: the answer of the system is replaced.
    monkeypatch.setattr(compilation_cache.os, "access", lambda path, mode: False)
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_user_without_a_home_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(compilation_cache.Path, "home", no_home)
    assert compilation_cache.enable() is None


def test_a_second_process_compiles_nothing() -> None:
    found = [
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(2)
    ]
    assert found[0] == 0
    assert found[1] > 0
