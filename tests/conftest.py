"""Every test is offline and deterministic: no hub, no sockets beyond loopback, a fixed seed."""

import os
import socket

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more; two workers share the machine instead

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["duramen.prune", "duramen.shrink"], "typecheck.checked")

import tiny  # noqa: E402


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    connect = socket.socket.connect

    def loopback_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a tiny Llama with a tokenizer; tests copy it before they damage it."""
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two different text files: (calibration, evaluation)."""
    folder = tmp_path_factory.mktemp("texts")
    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    calibration.write_text(tiny.prose(0, 3000))
    evaluation.write_text(tiny.prose(1, 3000))
    return calibration, evaluation


@pytest.fixture
def stop_once(monkeypatch):
    """Makes the next run stop before it keeps block 1, once."""
    from duramen.rundir import BlockStore

    def arm():
        real, stopped = BlockStore.save, []

        def save(self, index, block):
            if index == 1 and not stopped:
                stopped.append(index)
                raise KeyboardInterrupt
            real(self, index, block)

        monkeypatch.setattr(BlockStore, "save", save)

    return arm
