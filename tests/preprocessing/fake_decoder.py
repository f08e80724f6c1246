"""A fake rawpy.imread that crashes, kills, hangs or prints in its process, depending on a mark in the RAW file."""

from pathlib import Path

_SITECUSTOMIZE = """
import ctypes, os, rawpy, signal
real = rawpy.imread
def imread(source):
    if isinstance(source, str):
        with open(source, "rb") as file:
            data = file.read()
    else:
        data = source.read()
        source.seek(0)
    order = data.partition(b"ORDER:")[2].decode()
    if order == "hang":
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the GIL, like a hanging decoder
    elif order == "print":
        os.write(1, b"unexpected marker" + bytes([10]))
    elif order:
        os.kill(os.getpid(), getattr(signal, order))
    return real(source)
rawpy.imread = imread
"""


def fake_decoder_path(folder: Path) -> str:
    """A PYTHONPATH with which every Python process uses the fake decoder."""
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return str(folder / "path")


def mark_file(path: Path, order: str) -> None:
    """Append a mark to a RAW file; `order` is a signal's name, "hang" or "print"."""
    with path.open("ab") as file:
        file.write(f"ORDER:{order}".encode())
