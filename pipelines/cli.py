"""The command line: `sdan <verb>`. Heavy imports wait until a verb needs them, so that `sdan --help` is instant.

A wrong value ends in one clear line (what was expected, what came, what to do) and exit code 2, never a traceback.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from preprocessing.estimate import Estimate
    from preprocessing.shards import PreprocessOptions, PreprocessReport

OURS = ("preprocessing", "sdan", "tuning", "pipelines")

app = typer.Typer(
    help="SDAN: from a folder of RAW zoom sequences to a model that zooms photographs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Raw = Annotated[str, typer.Argument(metavar="RAW", help="Folder or s3:// URI of zoom sequences.")]
Shards = Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or s3:// URI of Parquet shards.")]
Scale = Annotated[int, typer.Option(help="Zoom factor of the pairs, 2 to 16.")]
Align = Annotated[str, typer.Option(help="scale: focal lengths only; ecc: registered, too.")]
Tile = Annotated[int, typer.Option(metavar="PX", help="Tile side in packed RAW pixels.")]
Stride = Annotated[int | None, typer.Option(metavar="PX", help="Step between tiles; default: 2/3 of the tile.")]
Exclude = Annotated[Path | None, typer.Option(metavar="FILE", help="Frames to leave out, one SEQUENCE/FRAME a line.")]
MissingJpg = Annotated[
    str, typer.Option(help="A RAW without a JPG: quarantine, or render (LibRaw's rendering stands in for the JPG).")
]
Val = Annotated[str, typer.Option(metavar="SEQ,SEQ", help="Sequences for the val split, whatever their hash says.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Train workers; one per GPU, or one, by default.")]
ConfigName = Annotated[
    str,
    typer.Option(
        "--config", metavar="NAME", help="paper_4x, paper_4x_rgb, srraw_4x, srraw_8x, smoke, demo or starter."
    ),
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. model.packing_kernel=4.")
]
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
    str, typer.Option("--model", metavar="URI", help="Checkpoint folder, runs:/ID, models:/sdan@champion or starter.")
]
CHAMPION = "models:/sdan@champion"


@app.callback()
def settings(
    data: Annotated[
        Path, typer.Option(envvar="SDAN_DATA", help="Where runs, checkpoints and MLflow's database live.")
    ] = Path("data"),
) -> None:
    """SDAN: from a folder of RAW zoom sequences to a model that zooms photographs."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["SDAN_DATA"] = str(data)
    if not os.environ.get("RAY_ADDRESS"):
        # Read when Ray is imported: without clusters a local Ray listens on 127.0.0.1 alone, not on every interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _data() -> Path:
    return Path(os.environ["SDAN_DATA"])


@app.command()
def demo() -> None:
    """All of it, small, on this machine, from simulated RAW; ends with a picture."""
    from pipelines import demo as pipeline

    result = pipeline.run(_data(), say=_say)
    _say(f"\nHeld-out sequences:\n\n{result.evaluation.table()}\n")
    started = result.starter.rows["SDAN (self)"]
    before = ", ".join(f"{target} {started[f'{target}_psnr']:.2f} dB" for target in result.starter.targets)
    _say(f"The starter model before it went on (self): {before}\n")
    for path in result.pictures:
        _say(f"picture: {path}")
    _say(f"model:   {result.training.model}")
    _say(f"zoom:    sdan zoom PHOTO -o zoomed.png --model {result.training.model}")
    _say(f"MLflow:  sdan --data {_data()} ui   (or: make ui), then open http://127.0.0.1:5000/")
    _say(f"done in {result.seconds / 60:.1f} minutes")


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write zoom sequences to.")],
    scenes: Annotated[Path | None, typer.Option(metavar="DIR", help="Photographs to use as scenes.")] = None,
    sequences: Annotated[int, typer.Option(metavar="N", help="How many sequences.")] = 4,
    width: Annotated[int, typer.Option(metavar="PX", help="Width of a frame (up to 4240).")] = 1536,
    preset: Annotated[str, typer.Option(help="Misalignment: perfect, tripod, default or handheld.")] = "default",
    raw_format: Annotated[str, typer.Option(help="dng or arw.")] = "dng",
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0,
) -> None:
    """Zoom sequences with known true geometry: RAW + camera JPG in SR-RAW's layout."""
    from preprocessing.simulator import sequences as simulator

    with _bar("simulate", "sequence", sequences) as step:
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


@app.command()
def preprocess(
    raw: Raw,
    shards: Shards,
    scale: Scale = 4,
    align: Align = "scale",
    tile: Tile = 96,
    stride: Stride = None,
    exclude: Exclude = None,
    missing_jpg: MissingJpg = "quarantine",
    val: Val = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """RAW sequences -> scale-aligned tiles in Parquet, one file per pair; what is done already is skipped."""
    from pipelines.cluster import start_ray
    from preprocessing import shards as job

    options = _options(scale, align, tile, stride, exclude, missing_jpg, val)
    start_ray()
    _say_report(job.preprocess(raw, shards, options, dry_run=dry_run), shards, dry_run)


@app.command()
def inspect(
    shards: Shards,
    out: Annotated[Path, typer.Option("-o", metavar="REPORT.html", help="Where to write the page.")],
) -> None:
    """What SHARDS holds, as one page: counts, misalignment, the worst-aligned pairs to look at, the quarantine."""
    from preprocessing.report import inspect as reports

    if out.is_dir() or not out.parent.is_dir():
        raise reports.InspectError(f"-o {out}: a file in a folder that exists expected, e.g. -o report.html")
    with _bar("inspect", "shard", None) as step:
        page = reports.inspect(shards, progress=step)
    out.write_text(page, encoding="utf-8")
    _say(f"{out} ({len(page.encode()) / 1e6:.1f} MB)")


@app.command()
def train(
    shards: Shards,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="paper_4x, paper_4x_rgb, srraw_4x (default), srraw_8x, smoke, demo, or starter (simulated shards).",
        ),
    ] = None,
    assignments: Assignments = None,
    workers: ElasticWorkers = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Short for --set train.seed=N.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Where checkpoints go, e.g. s3://BUCKET/runs; default: the run's folder."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="URI", help="A model to start from; its network is taken over.")
    ] = None,
    vgg_weights: VggWeights = None,
    name: Annotated[str | None, typer.Option(metavar="RUN", help="The run's name; made up by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --name, or with the newest unfinished run.")
    ] = False,
) -> None:
    """Train on shards with Ray Train; every run is browsed in the MLflow UI."""
    from pipelines import config as configs

    changes = configs.parse_assignments(assignments or ())
    if seed is not None:
        changes["train.seed"] = str(seed)
    chosen = configs.override(configs.named(config or "srraw_4x"), changes)
    from pipelines import cluster, registry
    from pipelines import train as training

    if init and resume:
        raise training.TrainError("--resume: goes on with the run's own weights; leave --init")
    start_from = registry.resolve_model(registry.default_tracking_uri(_data()), init) if init else None
    if start_from:
        chosen = training.with_network_of(start_from, chosen, changes)
    if resume:
        name, stored = training.stored_run(_data(), name)
        if config not in (None, stored.name):
            raise training.TrainError(f"--resume: the run's own config expected, {stored.name}, got {config}")
        chosen = configs.override(stored, changes)
    result = training.train(
        shards,
        chosen,
        data=_data(),
        workers=cluster.parse_workers(workers) if workers else None,
        name=name,
        resume=resume,
        storage=storage,
        init_from=start_from,
        vgg_weights=vgg_weights,
    )
    _say(f"model: {result.model} (registry: sdan, version {result.version}; MLflow run {result.run_id})")
    if result.champion:
        _say(f"the first model of this registry: it is {CHAMPION} now")
    else:
        _say(f"to make it {CHAMPION}: sdan promote {result.version}")
    for key, value in sorted(result.scores.items()):
        _say(f"  {key} {value:.4f}")


@app.command()
def evaluate(
    shards: Shards,
    model: ModelURI = CHAMPION,
    protocol: Annotated[str, typer.Option(help="self: what a user gets; oracle: reference from the target.")] = "self",
    target: Annotated[str | None, typer.Option(help="raw, aligned or true; all of them by default.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    crops: Annotated[int, typer.Option(metavar="N", help="Score at most N crops, spread evenly over the split.")] = 512,
    out: Annotated[Path | None, typer.Option("-o", metavar="DIR", help="Write table and examples here.")] = None,
) -> None:
    """The table: bicubic beside the model, by protocol and target."""
    from pipelines import evaluate as evaluation
    from pipelines import registry
    from pipelines.scoring.scores import PROTOCOLS

    if protocol not in PROTOCOLS:
        raise evaluation.EvaluateError(f"--protocol: self or oracle expected, got {protocol!r}")
    folder = registry.resolve_model(registry.default_tracking_uri(_data()), model)
    if crops < 1:
        raise evaluation.EvaluateError(f"--crops: at least 1 expected, got {crops}")
    targets = [target] if target else None
    result = evaluation.evaluate(shards, folder, split=split, targets=targets, limit=crops, out=out)
    _say(f"{model} on {shards}\n\n{result.table([protocol])}")
    if out:
        _say(f"\nwritten: {out / 'table.md'}, {out / 'evaluation.json'}, {out / 'examples.png'}")


@app.command()
def tune(
    shards: Shards,
    trials: Annotated[int, typer.Option(metavar="N", help="How many settings to try.")] = 8,
    space: Annotated[Path | None, typer.Option(metavar="FILE.py", help="Your own search space.")] = None,
    config: ConfigName = "srraw_4x",
    assignments: Assignments = None,
    workers: Workers = None,
    vgg_weights: VggWeights = None,
    name: Annotated[str, typer.Option(metavar="SWEEP", help="The sweep's name.")] = "sweep",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep of that name.")] = False,
) -> None:
    """Sweep the packing kernel and the loss weights over the real trainer; a parent MLflow run, a child per trial."""
    from pipelines import config as configs
    from pipelines import tune as pipeline

    chosen = configs.override(configs.named(config), configs.parse_assignments(assignments or ()))
    result = pipeline.tune(
        shards,
        chosen,
        data=_data(),
        trials=trials,
        space=space,
        workers=workers,
        vgg_weights=vgg_weights,
        name=name,
        resume=resume,
    )
    _say(pipeline.summary(result))


@app.command()
def retrain(
    raw: Raw,
    shards: Shards,
    scale: Scale = 4,
    align: Align = "scale",
    tile: Tile = 96,
    stride: Stride = None,
    exclude: Exclude = None,
    missing_jpg: MissingJpg = "quarantine",
    val: Val = "",
    config: ConfigName = "srraw_4x",
    assignments: Assignments = None,
    workers: Workers = None,
    vgg_weights: VggWeights = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
) -> None:
    """Preprocess only what is new, fine-tune the champion, promote the result if it is better."""
    from pipelines import config as configs
    from pipelines import retrain as pipeline
    from pipelines import status as statuses

    chosen = configs.override(configs.named(config), configs.parse_assignments(assignments or ()))
    options = _options(scale, align, tile, stride, exclude, missing_jpg, val)
    result = pipeline.retrain(
        raw,
        shards,
        data=_data(),
        options=options,
        config=chosen,
        workers=workers,
        vgg_weights=vgg_weights,
        dry_run=dry_run,
    )
    _say_report(result.preprocessed, shards, dry_run)
    if not dry_run:
        statuses.note_retrain(_data(), result.reason)
    for label, evaluation in (("champion", result.champion), ("new model", result.challenger)):
        if evaluation:
            _say(f"\n{label}:\n{evaluation.table(['self'])}")
    _say(f"\n{result.reason}")


@app.command()
def zoom(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="RAW (ARW, DNG, NEF, ...), JPG or PNG.")],
    out: Annotated[Path, typer.Option("-o", metavar="OUT", help="A .png, or a folder for several.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="As for evaluate; default: the champion, or without one the starter model of the package.",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="8 or 16 bits a channel.")] = 8,
) -> None:
    """Zoom photographs; writes PNGs the right way up."""
    from pipelines import registry
    from pipelines import zoom as pipeline

    tracking_uri = registry.default_tracking_uri(_data())
    if model is None and registry.get_champion(tracking_uri) is None:
        model = registry.STARTER
        _say(
            "no champion in the registry yet: zooming with the starter model, which was trained on simulated RAW alone"
        )
    zoomer = pipeline.Zoomer.load(registry.resolve_model(tracking_uri, model or CHAMPION))
    failed = 0
    targets = pipeline.output_paths(photos, out, zoomer.model.config.scale)
    pipeline.check_output(targets[0], bits)
    for path, target in zip(photos, targets, strict=True):
        try:
            photo = pipeline.read_photo(path, zoomer.model.config.input)
            if not photo.from_raw and zoomer.model.config.input != "rgb":
                _say(f"{path}: no RAW inside; its pixels stand in for the sensor's, expect less than from RAW")
            with _bar(path.name, "tile", None) as step:
                image = zoomer.zoom(photo, step)
            pipeline.write_png(image, target, bits=bits)
            _say(f"{target} ({image.shape[1]}x{image.shape[0]})")
        except ValueError as error:
            if len(photos) == 1:
                raise
            failed += 1
            typer.echo(f"sdan: set aside: {error}", err=True)
    if failed:
        raise pipeline.ZoomError(f"{failed} of {len(photos)} photographs set aside, see above")


@app.command()
def promote(version: Annotated[str, typer.Argument(metavar="VERSION", help="A version of the model sdan.")]) -> None:
    """Make a registered version the champion."""
    from pipelines import registry

    registry.set_champion(registry.default_tracking_uri(_data()), version)
    _say(f"{CHAMPION} is version {version}")


@app.command()
def status() -> None:
    """Runs, champion, shards, last retraining: one screen."""
    from pipelines import status as pipeline

    _say(str(pipeline.status(_data())))


@app.command()
def rollback() -> None:
    """Make the previous champion the champion again."""
    from pipelines import registry

    given_up, version = registry.rollback(registry.default_tracking_uri(_data()))
    _say(f"{CHAMPION} is version {version} again (was {given_up})")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """The MLflow UI on 127.0.0.1: runs, charts, pictures, models."""
    from pipelines import registry

    uri = registry.default_tracking_uri(_data())
    if uri.startswith("http"):
        _say(f"MLflow runs on a server: open {uri}")
        return
    registry.prepare_database(uri)
    _say(f"MLflow UI: http://127.0.0.1:{port}/   (Ctrl-C ends it)")
    python = str(Path(sys.executable))
    os.execv(
        python,
        [python, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)],
    )


@app.command()
def doctor() -> None:
    """What works on this machine - GPU, operators, Ray, MLflow, S3 - and what to do about the rest."""
    from pipelines import doctor as checks

    raise typer.Exit(checks.report(_data(), say=_say))


def _options(
    scale: int, align: str, tile: int, stride: int | None, exclude: Path | None, missing_jpg: str, val: str
) -> PreprocessOptions:
    from preprocessing.frames import read_exclusions
    from preprocessing.shards import PreprocessError, PreprocessOptions

    try:
        excluded = read_exclusions(exclude) if exclude else ()
    except ValueError as error:
        raise PreprocessError(f"--exclude: {error}") from error
    return PreprocessOptions(
        scale=scale,
        align=align,
        tile_px=tile,
        stride_px=stride if stride is not None else max(1, tile * 2 // 3),
        exclude=excluded,
        missing_jpg=missing_jpg,
        val=tuple(name.strip() for name in val.split(",") if name.strip()),
    )


def _say_report(report: PreprocessReport, shards: str, dry_run: bool) -> None:
    done = f"{report.todo} would be written" if dry_run else f"{report.written} written ({report.rows} tiles)"
    _say(
        f"{report.pairs} pairs: {done}, {report.skipped} there already, {len(report.quarantined)} set aside, "
        f"{report.seconds:.1f} s"
    )
    if report.estimate and report.todo:
        _say(f"  {_estimate_line(report.estimate)}")
    for entry in report.quarantined[:20]:
        _say(f"  set aside: {entry.sequence} {entry.pair}: {entry.reason}")
    if len(report.quarantined) > 20:
        _say(f"  ... {len(report.quarantined) - 20} more in {shards}/quarantine/")
    for note in report.notes:
        _say(f"  {note}")


def _estimate_line(estimate: Estimate) -> str:
    large = estimate.bytes >= 1e9
    size = f"about {estimate.tiles} tiles, {estimate.bytes / (1e9 if large else 1e6):.3g} {'GB' if large else 'MB'}"
    if estimate.seconds is None:
        return f"{size}; how long is not known before a first run into these SHARDS"
    minutes = estimate.seconds / 60
    span = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 0.1):.1f} minutes"
    return f"{size}, {span} on {estimate.cpus:g} CPUs at the last run's rate"


class _bar:
    """A tqdm bar as a progress callback (done, total)."""

    def __init__(self, label: str, unit: str, total: int | None) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=label, unit=unit)

    def __enter__(self) -> _bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def _say(text: str) -> None:
    typer.echo(text)


def main() -> None:
    """The `sdan` command."""
    try:
        app()
    except OSError as error:
        if error.filename is None or isinstance(error, ConnectionError):
            raise
        _stop(f"{error.filename}: {error.strerror}; choose a place that can be read and written")
    except Exception as error:
        package = type(error).__module__.split(".")[0]
        if package == "mlflow":
            _stop(f"MLflow at {os.environ.get('MLFLOW_TRACKING_URI', 'the --data folder')}: {str(error)[:300]}")
        if package not in OURS or not isinstance(error, ValueError):
            raise
        _stop(str(error))


def _stop(line: str) -> None:
    typer.echo(f"sdan: {' '.join(line.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
