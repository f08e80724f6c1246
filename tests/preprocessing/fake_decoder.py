"""A decoder that does to its process what a marked RAW file tells it to: crash, be killed, hang, print."""

from pathlib import Path

_STAND_IN = """
import ctypes, os, rawpy, signal
real = rawpy.imread
def imread(source):
    order = source.read().partition(b"ORDER:")[2].decode()
    source.seek(0)
    if order == "hang":
        ctypes.PyDLL(None).sleep(1000)  # Python's lock is held, as in a decoder that never ends
    elif order == "print":
        os.write(1, b"unexpected marker" + bytes([10]))
    elif order:
        os.kill(os.getpid(), getattr(signal, order))
    return real(source)
rawpy.imread = imread
"""


def fake_decoder_path(folder: Path) -> str:
    """A PYTHONPATH under which every Python process decodes with the stand-in."""
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(_STAND_IN)
    return str(folder / "path")


def mark_file(path: Path, order: str) -> None:
    """`order`: a signal's name, hang or print."""
    with path.open("ab") as file:
        file.write(f"ORDER:{order}".encode())
