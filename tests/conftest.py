"""What every test may ask for: tiny random models with a real tokenizer, the real small model, quiet surroundings."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch and the hub client load: one thread a process (the suite runs in two), and no test may reach out for a
# model by name.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

import tiny

if TYPE_CHECKING:
    from headwater.core.model import Model

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_randomness() -> Iterator[None]:
    """Each test starts from the same global random state and leaves none of its own behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """The bare `transformers` model (float32)."""
    return tiny.tiny_llama()


@pytest.fixture(scope="session")
def tiny_gpt2() -> Any:
    return tiny.tiny_gpt2()


def _wrap(hf: Any, tokenizer: Any) -> "Model":
    import headwater as hw

    return hw.load(hf, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: Any, tiny_tokenizer: Any) -> "Model":
    """headwater's Model around the tiny Llama (grouped queries, rotary positions)."""
    return _wrap(tiny_llama, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_model(tiny_gpt2: Any, tiny_tokenizer: Any) -> "Model":
    """headwater's Model around the tiny GPT-2 (learned positions, fused projections)."""
    return _wrap(tiny_gpt2, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_model64(tiny_tokenizer: Any) -> "Model":
    """The tiny Llama in float64, for comparisons with plain definitions."""
    return _wrap(tiny.tiny_llama(torch.float64), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_model64(tiny_tokenizer: Any) -> "Model":
    return _wrap(tiny.tiny_gpt2(torch.float64), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama and its tokenizer saved as a local folder."""
    return tiny.save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def smollm2() -> "Model":
    """The real SmolLM2-135M. Where it cannot be fetched the test is skipped, but never on CI."""
    import headwater as hw

    try:
        return hw.load("smollm2")
    except hw.HeadwaterError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"SmolLM2 is not to be had here: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Published data that lies beside a checkout (never inside it)."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no published data at {folder}")
    return folder


@pytest.fixture
def summary_table(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`summary_table(text)` shows a text (a measured table, say) after the results, from whichever process."""
    return lambda text: request.node.user_properties.append(("summary_table", text))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, text in getattr(report, "user_properties", ()):
                if name == "summary_table" and report.when == "call":
                    terminalreporter.write_line("")
                    terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def python() -> Any:
    """Run Python in a process of its own: `python("-c", "...") -> CompletedProcess` with text output."""

    def run(*arguments: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **kwargs)

    return run
