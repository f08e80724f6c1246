"""The command line, `sdan VERB`: parses options, calls the function that does the verb's work, and prints its result.

Heavy imports wait until a verb needs them, so that `sdan --help` is instant. A wrong value ends in one line (what,
where: expected A, got B; do C) and exit code 2, never in a traceback.
"""

import atexit
import csv as csv_format
import functools
import inspect as introspection
import io
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from pipelines.jobs.command import ClusterCommand

if TYPE_CHECKING:
    from preprocessing.colour import RenderingCurve
    from preprocessing.shards import PreprocessOptions

PACKAGES = ("preprocessing", "sdan", "tuning", "pipelines")
CHAMPION = "models:/sdan@champion"
TRAIN_PACKAGES = (
    *("ray", "mlflow", "optuna", "matplotlib", "pyarrow", "boto3", "botocore", "jinja2", "psutil", "lpips"),
    *("torchvision", "fastapi", "starlette", "uvicorn", "python_multipart"),
)
"""Third-party packages that only the extra `train` installs."""
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
"""Those that only the extra `export` installs."""
GRACE_S = 7.0
"""How long an interrupted command may take to stop by itself, before it is ended."""
WATCH_S = 0.2
"""How often the processes of Ray are looked at."""
GO_ON = "run the same command to go on"

app = typer.Typer(
    help="SDAN: from a folder of RAW zoom sequences to a model that zooms photographs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Raw = Annotated[
    str, typer.Argument(metavar="RAW", help="Folder or s3:// URI of zoom sequences: RAW and JPG, or pictures alone.")
]
Shards = Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or s3:// URI of Parquet shards.")]
ConfigName = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME",
        help="paper_4x, paper_4x_rgb, srraw_4x (default), srraw_8x, smoke, demo; simulated shards only: starter, "
        "starter-rgb.",
    ),
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. model.packing_kernel=4.")
]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Train workers; default: one per GPU, or one.")]
ElasticWorkers = Annotated[
    str | None,
    typer.Option(
        metavar="N|LEAST-MOST",
        help="Train workers; a range such as 1-4 grows and shrinks with the cluster; default: one per GPU, or one.",
    ),
]
VggWeights = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        envvar="SDAN_VGG_WEIGHTS",
        help="torchvision's vgg19 state dict, for losses that compare its features; default: through torchvision.",
    ),
]
ModelURI = Annotated[
    str,
    typer.Option(
        "--model", metavar="URI", help="Checkpoint folder, runs:/ID, models:/sdan@champion, starter or starter-rgb."
    ),
]
Photos = Annotated[
    list[str],
    typer.Argument(metavar="PHOTO...", help="RAW (ARW, DNG, NEF, ...), JPG, PNG, TIFF, a folder or an s3:// URI."),
]
ZoomedTo = Annotated[
    str,
    typer.Option(
        "-o", metavar="OUT", help="A .png, .tif, .jpg or .dng, or a folder or s3:// URI for several photographs."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
CostOnly = Annotated[
    bool, typer.Option("--dry-run", help="Say tasks, hours, gigabytes and dollars by measured rates; change nothing.")
]
DollarsPerHour = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]DOLLARS", help="For --dry-run: the price of this machine or cluster, or of an instance type."
    ),
]
TimeBudget = Annotated[str | None, typer.Option(metavar="TIME", help="End after e.g. 30m or 2h; --resume goes on.")]
Concurrent = Annotated[int | None, typer.Option(metavar="N", help="Trials at once; default: one per GPU, or one.")]
GpusPerTrial = Annotated[
    float | None, typer.Option(metavar="N", help="0.5, 1, 2, ...; default: one per worker, if there are GPUs.")
]
Strength = Annotated[
    float, typer.Option(help="1: the model's detail; 0: bicubic; between them a mixture.", min=0, max=1)
]
LikeCamera = Annotated[
    bool, typer.Option("--like-camera", help="Give a RAW the tones of the JPG beside it, or else inside it.")
]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, or cuda:N for the GPU of that number.")
]


class _Interrupts:
    """Ends the command on Ctrl-C, on SIGTERM and when its Ray is lost: one line, no traceback, within seconds.

    Ctrl-C gives exit code 130, SIGTERM 143, a lost Ray 2. Each of them raises KeyboardInterrupt in the main thread, so
    that files and runs are left as after any error. A second signal, or GRACE_S, ends the process at once: the main
    thread may wait in C++, where no exception reaches it.
    """

    def __init__(self) -> None:
        self.kept: str | Callable[[], str] = "run the command again"
        """What is kept and how to go on; the verb sets it."""
        self.code: int | None = None
        """The exit code; None: nothing has interrupted the command."""
        self._cause = ""
        self._signals = 0
        self._said = False
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupts":
        self.__init__()  # type: ignore[misc]
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader, writer), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.code is None:
            signal.set_wakeup_fd(-1)
            self._over.set()
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def kept_line(self) -> str:
        """What is kept and how to go on."""
        return self.kept if isinstance(self.kept, str) else self.kept()

    def end(self) -> NoReturn:
        """Print the line and exit."""
        self._say()
        _leave(cast("int", self.code))

    def _on_signal(self, number: int, frame: object) -> None:
        """Python calls it in the main thread, once that runs Python code."""
        self._signals += 1
        if self._signals > 1:
            self._end_now()
        self._begin(*_of_signal(number))
        raise KeyboardInterrupt

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        """See signals whatever the main thread does, and the end of a process of this command's own Ray, for which Ray
        would wait a minute or print pages."""
        while not self._over.is_set():
            if select.select([reader], [], [], WATCH_S)[0]:
                number = reader.recv(1)[0]
                if number in self._before:
                    self._begin(*_of_signal(number))
            # While the main thread imports that module, the function is not there yet.
            look = getattr(sys.modules.get("pipelines.cluster"), "lost", None)
            if self.code is None and look is not None and (lost := look()) and not self._over.is_set():
                self._begin(2, lost)
                signal.pthread_kill(cast("int", threading.main_thread().ident), signal.SIGTERM)
        reader.close()
        writer.close()

    def _begin(self, code: int, cause: str) -> None:
        with self._lock:
            if self.code is None:
                self.code, self._cause = code, cause
                end = threading.Timer(GRACE_S, self._end_now)
                end.daemon = True
                end.start()

    def _end_now(self) -> None:
        try:
            self._say(before="\n")  # a progress bar may be on the line
        finally:
            os._exit(cast("int", self.code))

    def _say(self, before: str = "") -> None:
        if not self._said:
            self._said = True
            line = f"{self._cause}; {self.kept_line()}"
            sys.stderr.write(before)
            _warn(line)
            sys.stderr.flush()


def _leave(code: int) -> NoReturn:
    """Exit after Python's exit functions; Ray's ends its processes. The interpreter is not torn down: Ray may then wait
    in C++, and GRACE_S no longer counts."""
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _of_signal(number: int) -> tuple[int, str]:
    """(exit code, what is said of it)."""
    return 128 + number, f"interrupted by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"


_INTERRUPTS = _Interrupts()


def _keep(kept: str | Callable[[], str]) -> None:
    _INTERRUPTS.kept = kept


ClusterCommand.announce = staticmethod(_keep)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _say(f"sdan {version('sdan')}")
        raise typer.Exit


@app.callback()
def settings(
    data: Annotated[
        Path, typer.Option(envvar="SDAN_DATA", help="Folder of runs, checkpoints and MLflow's database.")
    ] = Path("data"),
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SDAN: from a folder of RAW zoom sequences to a model that zooms photographs."""
    _check_data(data)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # It logs the traceback of errors that MLflow then raises; they end in one line (`_explanation`).
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # It announces a wait of 300 s for a version that is there at once.
    logging.getLogger("mlflow.store.model_registry.abstract_store").setLevel(logging.WARNING)
    os.environ["SDAN_DATA"] = str(data)
    if not os.environ.get("RAY_ADDRESS"):
        # Ray reads this when it is imported: a local Ray then listens only on 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


class DataError(ValueError):
    """A --data that cannot be used; the message says what to do."""


def _check_data(data: Path) -> None:
    """Refuse a --data that is not a folder, or lies below a file, before any verb works."""
    for place in (data.expanduser(), *data.expanduser().parents):
        if place.is_dir():
            return
        if place.exists() or place.is_symlink():
            kind = "a file" if place.exists() else "a link to nothing"
            where = "" if place == data.expanduser() else f" at {place}"
            raise DataError(
                f"--data {data}: expected a folder, or a new name, got {kind}{where}; choose another folder"
            )


def _data() -> Path:
    return Path(os.environ["SDAN_DATA"])


def _preprocess_options(
    shards: str,
    scale: Annotated[
        int | None, typer.Option(help="Zoom factor of the pairs, 2 to 16; default: that of SHARDS, else 4.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(help="scale: focal lengths only; ecc: also registered; default: that of SHARDS, else scale."),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Tile side in packed RAW pixels; default: that of SHARDS, else 96."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Step between tiles; default: that of SHARDS, else 2/3 of the tile."),
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Frames to leave out, one SEQUENCE/FRAME per line.")
    ] = None,
    missing_jpg: Annotated[
        str | None,
        typer.Option(
            help="For a RAW without a JPG: quarantine it, or render a JPG with LibRaw; default: that of SHARDS, else "
            "quarantine."
        ),
    ] = None,
    val: Annotated[str, typer.Option(metavar="SEQ,SEQ", help="Sequences to put in the val split.")] = "",
    keep_unaligned: Annotated[
        bool, typer.Option("--keep-unaligned", help="Keep pairs that do not seem to show the same thing.")
    ] = False,
    curve: Annotated[
        str | None, typer.Option(help="Curve of the renderings: srgb or bt709; default: that of SHARDS, else srgb.")
    ] = None,
    zoom: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="For pictures without RAW and EXIF: long focal length / short one, e.g. 2.9; default: that of SHARDS.",
        ),
    ] = None,
) -> "PreprocessOptions":
    from preprocessing.frames import read_exclusions
    from preprocessing.ledger import stored_options
    from preprocessing.shards import PreprocessError, PreprocessOptions

    try:
        excluded = read_exclusions(exclude) if exclude else ()
    except ValueError as error:
        raise PreprocessError(f"--exclude: {error}") from error
    asked = {"scale": scale, "align": align, "tile_px": tile, "stride_px": stride, "missing_jpg": missing_jpg}
    return PreprocessOptions(
        **_joined_options(stored_options(shards), asked),
        exclude=excluded,
        val=tuple(name.strip() for name in val.split(",") if name.strip()),
        keep_unaligned=keep_unaligned,
        curve=cast("RenderingCurve | None", curve),  # PreprocessOptions refuses other names
        zoom=zoom,
    )


def _joined_options(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were asked for; where there are none, those of SHARDS."""
    own = {name: value for name, value in stored.items() if name in asked}
    if asked["tile_px"] not in (None, own.get("tile_px")):
        own.pop("stride_px", None)  # it belongs to the tile of SHARDS
    shared = own | {name: value for name, value in asked.items() if value is not None}
    if "tile_px" in shared:
        shared.setdefault("stride_px", max(1, shared["tile_px"] * 2 // 3))
    return shared


def _takes_preprocess_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options` of a verb by the command-line options of `_preprocess_options`."""
    shared = dict(introspection.signature(_preprocess_options).parameters)
    del shared["shards"]  # an argument of the verb
    own = introspection.signature(verb).parameters

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        options = _preprocess_options(given["shards"], **{name: given.pop(name) for name in shared})
        verb(options=options, **given)

    del command.__wrapped__  # Typer would read the verb's own signature
    command.__annotations__ = {}
    merged: list[introspection.Parameter] = []
    for name, parameter in own.items():
        merged += shared.values() if name == "options" else [parameter]
    command.__signature__ = introspection.Signature(merged)  # type: ignore[attr-defined]
    return command


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Shorter: 4 sequences and 2 epochs; the scores are lower.")
    ] = False,
) -> None:
    """Run every stage at a small size on this machine, from simulated RAW to a picture."""
    from pipelines import demo as verb

    _INTERRUPTS.kept = f"finished sequences and pairs are kept; {GO_ON}"
    result = verb.run(_data(), say=_say, size=verb.QUICK if quick else verb.FULL)
    _say(verb.summary(result, _data()))


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write zoom sequences to.")],
    scenes: Annotated[Path | None, typer.Option(metavar="DIR", help="Photographs to use as scenes.")] = None,
    sequences: Annotated[int, typer.Option(metavar="N", help="Number of sequences.")] = 4,
    width: Annotated[int, typer.Option(metavar="PX", help="Width of a frame (up to 4240).")] = 1536,
    preset: Annotated[str, typer.Option(help="perfect, tripod, default, handheld or wide (many cameras).")] = "default",
    raw_format: Annotated[str, typer.Option(help="dng or arw.")] = "dng",
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
) -> None:
    """Write zoom sequences with known true geometry: RAW + camera JPG in SR-RAW's layout."""
    from preprocessing.simulator import sequences as simulator

    _INTERRUPTS.kept = f"finished sequences are kept; {GO_ON}"
    with _bar("simulate", "sequence") as step:
        folders = simulator.simulate(
            out,
            scenes=scenes,
            sequences=sequences,
            width_px=width,
            preset=preset,
            raw_format=raw_format,
            seed=seed,
            progress=step,
        )
    _say(f"{len(folders)} simulated sequences in {out}")


@app.command(cls=ClusterCommand)
@_takes_preprocess_options
def preprocess(
    raw: Raw,
    shards: Shards,
    options: "PreprocessOptions",
    dry_run: CostOnly = False,
    dollars_per_hour: DollarsPerHour = None,
) -> None:
    """Cut RAW sequences into scale-aligned tiles in Parquet, one file per pair; finished pairs are skipped."""
    from pipelines.cluster import start_ray
    from pipelines.monitoring.published import pair_finished
    from preprocessing import shards as verb
    from preprocessing.report.job_summary import job_summary

    _INTERRUPTS.kept = f"finished pairs are kept; {GO_ON}"
    report = verb.preprocess(raw, shards, options, dry_run=dry_run, start_ray=start_ray, on_pair=pair_finished)
    _say(job_summary(report, shards, dry_run=dry_run))
    if report.estimate:
        from pipelines.costs import estimate

        asked = estimate.parse_prices(dollars_per_hour)
        registers = options.align == "ecc"
        _say(str(estimate.preprocessing(report.todo, report.estimate, registers=registers, asked=asked)))


@app.command()
def inspect(
    shards: Shards,
    out: Annotated[Path, typer.Option("-o", metavar="REPORT.html", help="Where to write the page.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one page about SHARDS: counts, misalignment, the worst-aligned pairs, the quarantine."""
    from preprocessing.report import inspect as verb

    verb.check_output(out)
    with _bar("inspect", "shard") as step:
        page = verb.inspect(shards, progress=step)
    out.write_text(page, encoding="utf-8")
    _say(f"{out} ({len(page.encode()) / 1e6:.1f} MB)")


@app.command(cls=ClusterCommand)
def train(
    shards: Shards,
    config: ConfigName = None,
    assignments: Assignments = None,
    workers: ElasticWorkers = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Short for --set train.epochs=N.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Short for --set train.seed=N.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Where checkpoints go, e.g. s3://BUCKET/runs; default: the run's folder."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="URI", help="A model to start from; the run takes over its network.")
    ] = None,
    vgg_weights: VggWeights = None,
    name: Annotated[str | None, typer.Option(metavar="RUN", help="The run's name; default: config and time.")] = None,
    gpu_wait: Annotated[
        float, typer.Option(metavar="S", help="On a cluster: how long to wait for GPUs that its autoscaler starts.")
    ] = 900,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run --name, or the newest unfinished run.")
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every value that these options give, and train nothing.")
    ] = False,
    dry_run: CostOnly = False,
    dollars_per_hour: DollarsPerHour = None,
) -> None:
    """Train on shards with Ray Train; every run appears in the MLflow UI."""
    from pipelines import cluster
    from pipelines import config as configs
    from pipelines import train as verb

    began = time.time()
    changes = [*(assignments or ()), *([] if epochs is None else [f"train.epochs={epochs}"])]
    choice = verb.choose(_data(), config=config, assignments=changes, seed=seed, init=init, name=name, resume=resume)
    _INTERRUPTS.kept = lambda: verb.kept(_data(), choice.name, began)
    if show_config:
        _say("\n".join(f"{key}={value}" for key, value in configs.flatten(choice.config).items()))
        return
    wanted = cluster.parse_workers(workers) if workers else None
    if dry_run:
        from pipelines.costs import estimate

        asked = estimate.parse_prices(dollars_per_hour)
        _say(str(estimate.training(shards, choice.config, _data(), workers=wanted, asked=asked)))
        return
    result = verb.train(
        shards,
        choice.config,
        data=_data(),
        workers=wanted,
        name=choice.name,
        resume=resume,
        storage=storage,
        init_from=choice.init_from,
        vgg_weights=vgg_weights,
        gpu_wait_s=gpu_wait,
    )
    _say(verb.summary(result))


@app.command(cls=ClusterCommand)
def evaluate(
    shards: Shards,
    model: ModelURI = CHAMPION,
    protocol: Annotated[str, typer.Option(help="self: what a user gets; oracle: reference from the target.")] = "self",
    target: Annotated[str | None, typer.Option(help="raw, aligned or true; default: all.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    crops: Annotated[int, typer.Option(metavar="N", help="Score at most N crops, spread over the split.")] = 512,
    pair: Annotated[
        str | None, typer.Option(metavar="LR-HR", help="One pair of frames only; SR-RAW's test: 00006-00002.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Ray workers that score; 1: none; default: as many as pay.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", metavar="DIR", help="Write report.html and tables here.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the rows of both protocols as CSV.")
    ] = None,
) -> None:
    """Print the table of bicubic and the model, by protocol and target."""
    from pipelines import evaluate as verb
    from pipelines import registry

    targets = [target] if target else None
    verb.check_request(split, targets, crops, [protocol], workers=workers)
    if csv:
        csv.parent.mkdir(parents=True, exist_ok=True)
        csv.open("a").close()  # fail before the work, not after it
    folder = registry.resolve_model(registry.default_tracking_uri(_data()), model)
    result = verb.evaluate(
        shards, folder, split=split, targets=targets, limit=crops, pair=pair, out=out, workers=workers
    )
    _say(f"{model} on {shards}\n\n{result.table([protocol])}")
    if csv:
        csv.write_text(_as_csv(result.rows), encoding="utf-8")
        _say(f"\nwritten: {csv}")
    if out:
        _say(f"\nwritten to {out}: report.html, table.md, groups.md, evaluation.json, tiles.parquet, examples.png")


@app.command(cls=ClusterCommand)
def compare(
    shards: Shards,
    table: Annotated[int, typer.Option(metavar="1|2", help="The paper's table.")],
    out: Annotated[
        Path | None, typer.Option("-o", metavar="DIR", help="Where to write and go on; default: DATA/compare/tableN.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimizer steps of each row; default: the epochs of its config.")
    ] = None,
    rows: Annotated[str, typer.Option(metavar="NAME,NAME", help="Some rows only, e.g. srresnet,sdan-raw.")] = "",
    assignments: Assignments = None,
    split: Annotated[str, typer.Option(help="The split that is scored: train, val or test.")] = "val",
    crops: Annotated[int, typer.Option(metavar="N", help="Score at most N crops, spread over the split.")] = 64,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Train workers of a row; default: one.")] = None,
    concurrent: Annotated[
        int | None, typer.Option(metavar="N", help="Rows at once; default: one per GPU, or one.")
    ] = None,
    vgg_weights: VggWeights = None,
) -> None:
    """Train and score the rows of the paper's Table 1 or 2 alike; the same command goes on with unfinished rows."""
    _INTERRUPTS.kept = f"finished rows are kept, the others go on from their last checkpoint; {GO_ON}"
    from pipelines.comparing import verb

    names = tuple(name.strip() for name in rows.split(",") if name.strip())
    options = verb.Options(table, names, steps, tuple(assignments or ()), split, crops, workers, concurrent)
    folder = out or verb.default_out(_data(), table)
    result = verb.compare(shards, options, data=_data(), out=folder, vgg_weights=vgg_weights, say=_say)
    _say(verb.summary(result))


@app.command(cls=ClusterCommand)
def tune(
    shards: Shards,
    trials: Annotated[int, typer.Option(metavar="N", help="Number of settings to try; --resume may raise it.")] = 8,
    space: Annotated[
        str, typer.Option(metavar="NAME|FILE.py", help="default, paper, size, offsets, or your own search space.")
    ] = "default",
    search: Annotated[str, typer.Option(help="tpe, random, or grid: every setting of a finite space.")] = "tpe",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:min|:max]", help="val_psnr; give several for a Pareto front, e.g. ms_per_megapixel."
        ),
    ] = None,
    grace: Annotated[int, typer.Option(metavar="N", help="Stop no trial before this epoch.")] = 1,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Seeds of the best three and the default setting: measures the noise.")
    ] = 1,
    time_budget: TimeBudget = None,
    concurrent: Concurrent = None,
    gpus_per_trial: GpusPerTrial = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers-per-trial", "--workers", metavar="N", help="Default: one per GPU of the trial, or one."
        ),
    ] = None,
    register: Annotated[
        bool, typer.Option("--register", help="Register the chosen trial's model as challenger, not as champion.")
    ] = False,
    config: ConfigName = None,
    assignments: Assignments = None,
    vgg_weights: VggWeights = None,
    name: Annotated[str, typer.Option(metavar="SWEEP", help="The sweep's name.")] = "sweep",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep of that name.")] = False,
    dry_run: CostOnly = False,
    dollars_per_hour: DollarsPerHour = None,
) -> None:
    """Try settings, say which is better by more than noise, and write a page; MLflow gets a child run per trial."""
    from pipelines import config as configs
    from pipelines import tune as verb
    from tuning.plan import parse_duration

    _INTERRUPTS.kept = lambda: verb.kept(_data(), name)
    metrics = tuple(metric) if metric else verb.Options.metrics
    budget_s = parse_duration(time_budget) if time_budget else None
    options = verb.Options(
        trials, space, search, metrics, grace, repeats, budget_s, concurrent, workers, gpus_per_trial
    )  # fmt: skip
    chosen = configs.chosen(config, assignments or ())
    if dry_run:
        from pipelines.costs import estimate

        asked = estimate.parse_prices(dollars_per_hour)
        _say(str(estimate.sweep(shards, chosen, _data(), options, workers=workers, asked=asked)))
        return
    result = verb.tune(shards, chosen, options, data=_data(), vgg_weights=vgg_weights, name=name, resume=resume)
    _say(verb.summary(result))
    if register:
        _say(verb.register(result, _data(), name))


@app.command(cls=ClusterCommand)
@_takes_preprocess_options
def retrain(
    raw: Raw,
    shards: Shards,
    options: "PreprocessOptions",
    config: ConfigName = None,
    assignments: Assignments = None,
    workers: Workers = None,
    vgg_weights: VggWeights = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="Least mean PSNR gain over the champion for a promotion, beside its interval; default: 0.05.",
        ),
    ] = None,
    replay: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of a fine-tuning's crops from pairs that the champion knows; default: its own (0.5).",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Preprocess what is new, fine-tune the champion, and promote the result if it is better.

    A run that was killed is continued by the next one; a second run at the same time ends with exit code 0.
    --config and --set are for a first model; the champion is fine-tuned with its own config.
    """
    from pipelines import config as configs
    from pipelines import retrain as verb

    _INTERRUPTS.kept = f"the champion stays, and what is finished is kept; {GO_ON}"
    try:
        result = verb.retrain(
            raw,
            shards,
            data=_data(),
            options=options,
            config=configs.chosen(config, assignments or ()) if config or assignments else None,
            workers=workers,
            vgg_weights=vgg_weights,
            margin_db=verb.MARGIN_DB if margin is None else margin,
            replay_share=replay,
            dry_run=dry_run,
        )
    except verb.RetrainRunning as running:
        _say(str(running))
        return
    _say(verb.summary(result, shards, dry_run=dry_run))


@app.command(cls=ClusterCommand)
def zoom(
    photos: Photos,
    out: ZoomedTo,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="As for evaluate; default: the champion, and the starters for what it does not read."
        ),
    ] = None,
    picture_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="png, tiff, jpg or dng; default: by OUT, or png.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="8 or 16 bits per channel; default: 16 for tiff and dng, else 8.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of jpg, 1 to 100.")] = 95,
    scale: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; default: the model's.")] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="X,Y,W,H", help="Zoom only this part; pixels of the upright photograph.")
    ] = None,
    strength: Strength = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    no_gps: Annotated[bool, typer.Option("--no-gps", help="Leave the place out of the tags.")] = False,
    like_camera: LikeCamera = False,
    device: Device = "auto",
    dry_run: CostOnly = False,
    dollars_per_hour: DollarsPerHour = None,
) -> None:
    """Zoom photographs; writes them upright, in sRGB, with their EXIF tags. Of a folder or bucket, what is there and
    whole is skipped."""
    from pipelines.zooming import request, start

    _INTERRUPTS.kept = "the files named above are complete, nothing else was left"
    area = request.parse_crop(crop) if crop is not None else None
    output = request.Output(picture_format, bits, quality, scale, area, overwrite, not no_gps, like_camera)
    files = [Path(photo) for photo in photos]
    if batch := request.is_batch(photos, out):
        _INTERRUPTS.kept = f"finished photographs are kept; {GO_ON}{' without --overwrite' if overwrite else ''}"
        request.check_batch(out, output)
    else:
        request.check_request(files, Path(out), output)
    request.check_device(device)
    if dry_run:
        from pipelines.costs import estimate, photographs

        count, there = photographs.counted(photos, out, scale or 4)
        _say(str(estimate.zooming(count, there, asked=estimate.parse_prices(dollars_per_hour))))
        return
    with start.large_imports(driver=device in ("auto", "cuda", "cuda:0")):
        from pipelines import zoom as verb
        from pipelines.zooming.models import choose_models

    chosen = choose_models(_data(), model)
    if batch:
        from pipelines.zoom_folder.batch import zoom_batch

        report = zoom_batch(chosen, photos, out, strength=strength, output=output, device=device, say=_say, warn=_warn)
        _say(report.summary())
        return
    verb.zoom_with(chosen, files, Path(out), strength=strength, output=output, device=device, say=_say, warn=_warn)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(metavar="URI", help="As for zoom; by default it follows the champion.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port on HOST.")] = 8000,
    max_upload: Annotated[float, typer.Option(metavar="MB", help="Largest photograph that is taken.")] = 200,
    max_megapixels: Annotated[float, typer.Option(metavar="N", help="Most megapixels of a photograph.")] = 50,
    queue: Annotated[int, typer.Option(metavar="N", help="Photographs that may wait; others get a 503.")] = 32,
    timeout: Annotated[float, typer.Option(metavar="S", help="Most seconds from a request to its answer.")] = 600,
    upload_timeout: Annotated[float, typer.Option(metavar="S", help="Most seconds for a photograph to arrive.")] = 60,
) -> None:
    """Zoom photographs over HTTP: a page for browsers at /, POST /zoom for programs, /docs, /healthz."""
    from pipelines.serving.limits import Limits

    _INTERRUPTS.kept = "photographs in work were given up"
    limits = Limits(max_upload, max_megapixels, queue, timeout, upload_timeout)
    from pipelines.serving import service as verb

    verb.run(_data(), model, host=host, port=port, limits=limits, say=_say, warn=_warn)


@app.command()
def export(
    out: Annotated[Path, typer.Option("-o", metavar="FILE", help="A .onnx or .pt2; for darktable a folder.")],
    model: ModelURI = CHAMPION,
    file_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="onnx, darktable or pt2; default: by FILE.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing FILE.")] = False,
) -> None:
    """Write a model as ONNX, for darktable, or as PyTorch's pt2, and check the file against the model."""
    from pipelines import registry
    from pipelines.export import verb

    _INTERRUPTS.kept = "nothing was written"
    kind = verb.check_request(out, file_format, overwrite=overwrite)
    folder = registry.resolve_model(registry.default_tracking_uri(_data()), model)
    _say("exporting takes about a minute")
    _say(verb.export(folder, out, kind).summary())


@app.command()
def promote(version: Annotated[str, typer.Argument(metavar="VERSION", help="A version of the model sdan.")]) -> None:
    """Make a registered version the champion."""
    from pipelines import registry

    registry.set_champion(registry.default_tracking_uri(_data()), version)
    _say(f"{CHAMPION} is version {version}")


@app.command()
def status() -> None:
    """Show runs, champion, shards, the last retrainings, what is new, the next run and the lock on one screen."""
    from pipelines import status as verb

    _say(str(verb.status(_data())))


@app.command()
def rollback() -> None:
    """Make the previous champion the champion again."""
    from pipelines import registry

    before, version = registry.rollback(registry.default_tracking_uri(_data()))
    _say(f"{CHAMPION} is version {version} again (was {before})")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Serve the MLflow UI on 127.0.0.1: runs, charts, pictures, models."""
    from pipelines import registry

    uri = registry.default_tracking_uri(_data())
    if uri.startswith("http"):
        _say(f"MLflow runs on a server: open {registry.without_password(registry.ui_link(uri, uri))}")
        return
    registry.check_port(port)
    registry.prepare_database(uri)
    _say(f"MLflow UI: {registry.ui_link(uri, f'http://127.0.0.1:{port}')}   (Ctrl-C ends it)")
    # One worker process: a supervisor of several ends them on a busy machine, because they start too slowly for it. The
    # rest keeps lines about MLflow's own parts away, which push the link off the screen.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    server = ["--workers", "1", "--uvicorn-opts", "--log-level warning", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, *server])


@app.command(cls=ClusterCommand)
def doctor(
    s3: Annotated[
        str | None,
        typer.Option("--s3", metavar="URI", help="An s3:// URI below which to try writing, reading, and deleting."),
    ] = None,
) -> None:
    """Check what works (GPUs, operators, Ray, MLflow, S3; on a cluster each node and the network) and say what to do
    about the rest; exit code 1 if anything is broken."""
    from pipelines import doctor as verb

    raise typer.Exit(verb.report(_data(), say=_say, s3=s3))


def _as_csv(rows: dict[str, dict[str, float]]) -> str:
    """A table of rows by name as CSV; a value that a row lacks is empty."""
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    text = io.StringIO()
    table = csv_format.DictWriter(text, ["row", *columns], lineterminator="\n")
    table.writeheader()
    table.writerows({"row": name, **values} for name, values in rows.items())
    return text.getvalue()


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A tqdm bar as a progress callback (done, total); it appears at the first call, so after the verb's checks."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def move(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=label, unit=unit))
        bars[0].update(done - bars[0].n)

    try:
        yield move
    finally:
        for bar in bars:
            bar.close()


def _say(text: str) -> None:
    typer.echo(text)


def _warn(line: str) -> None:
    typer.echo(f"sdan: {line}", err=True)


def main() -> None:
    """The `sdan` command."""
    with _INTERRUPTS:
        try:
            app()
        except BaseException as error:
            if _INTERRUPTS.code is not None:
                _INTERRUPTS.end()
            if (line := _explanation(error)) is None:
                raise
            _stop(line)


def _explanation(error: BaseException) -> str | None:
    """The line to print instead of a traceback; None for a defect of ours, and for the end of the program."""
    package = type(error).__module__.split(".")[0]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        for extra, names in (("train", TRAIN_PACKAGES), ("export", EXPORT_PACKAGES)):
            if package in names:
                return (
                    f"this command: expected the package {package}, got an installation without it; "
                    f"pip install 'sdan[{extra}]'"
                )
    elif isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.filename is not None:
        return f"{error.filename}: expected a readable and writable path, got {error.strerror}; choose another"
    elif package in ("mlflow", "sqlalchemy"):
        from pipelines.registry import without_password

        if "MLFLOW_TRACKING_URI" not in os.environ and not _data().is_dir():
            return f"--data {_data()}: expected a folder that stays while the command runs, got none; put it back"
        where = without_password(os.environ.get("MLFLOW_TRACKING_URI", "the --data folder"))
        reason = without_password(str(error).partition("\n")[0])[:300]
        return f"MLflow, {where}: expected an answer, got {reason}; see `sdan doctor`"
    elif package == "ray" and not any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__):
        got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        return f"Ray: expected it to run until the command ends, got {got}; {_INTERRUPTS.kept_line()}"
    elif package in PACKAGES and isinstance(error, ValueError):
        return str(error)
    return None


def _stop(line: str) -> NoReturn:
    _warn(" ".join(line.split()))
    sys.exit(2)


if __name__ == "__main__":
    main()
