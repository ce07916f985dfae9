"""What all tests have in common: marks, and property tests that do not depend on the machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("steady")


# Processes that share a pipe would write their lines into one another's: an unbuffered print is several writes.
os.environ.pop("PYTHONUNBUFFERED", None)

# What runs in a shell's background, or under nohup, ignores these, and so would all that tests start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than some seconds; left out with --fast")
    config.addinivalue_line("markers", "leaves_threads: ends ranks in the middle of a round on purpose")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow, and --fast was given"))


@pytest.fixture(scope="module", params=["one host", "several hosts"])
def hosts(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let sharded embeddings exchange as ranks of one host do, and as those of several."""
    from hvd_shadowsync.embedding.onehost import OneHost

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "several hosts":
            patch.setattr(OneHost, "of", lambda *_: None)
        yield request.param
