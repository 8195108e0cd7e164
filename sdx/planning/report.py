"""A plan as a table for people, the verdict last."""

from collections.abc import Iterator

from sdx.config.schema import Platform
from sdx.parallel.sharding import SMALLEST_SHARDED_BYTES
from sdx.planning.compiled import GIB, CompiledProgram, CompiledReport
from sdx.planning.estimate import Estimate
from sdx.planning.verdict import Plan, compiler_says

MIB = 2**20
LABEL = 14
WIDTH = 96

Row = tuple[str, str]


def render(plan: Plan) -> str:
    """The plan as lines of a label and a value, at most 96 columns where nothing typed is long."""
    found = plan.estimate
    title = f"{found.config.model.name} on {found.config.hardware.name}"
    sections = [
        _what(found),
        _device(found),
        [*_resolutions((*plan.others, found))],
        _beside(found),
        [*_compiled(plan)],
        [*((("note", note)) for note in plan.notes)],
        [*_verdict(plan)],
    ]
    lines = [title]
    for rows in filter(None, sections):
        lines.append("")
        lines += [f"  {label:<{LABEL}}{value}".rstrip() for label, value in rows]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / MIB:,.1f} MiB"


def _what(found: Estimate) -> list[Row]:
    parameters, hosts = found.parameters, found.config.hardware.num_hosts
    mesh = " x ".join(f"{axis} {count}" for axis, count in found.mesh.items())
    text = "trained" if found.config.train.text_encoder else "frozen"
    at = f" on {hosts} hosts" if hosts > 1 else ""
    return [
        ("devices", f"{found.num_devices}{at}, mesh {mesh}"),
        ("parameters", f"{parameters.unet:>13,}  UNet, trained"),
        ("", f"{parameters.vae:>13,}  autoencoder, frozen"),
        ("", f"{parameters.text_encoder:>13,}  text encoder, {text}"),
        ("batch", _batch(found)),
        *_work(found),
        *_speed(found),
    ]


def _batch(found: Estimate) -> str:
    pieces, (height, width) = found.config.train.gradient_accumulation, found.image
    split = f" in each of {pieces} micro-steps" if pieces > 1 else ""
    largest = " (the largest bucket)" if found.config.data.buckets else ""
    return (
        f"{found.global_batch_size} images of {width} x {height}{largest} an update, "
        f"{found.per_device_batch_size:g} on each device{split}"
    )


def _work(found: Estimate) -> Iterator[Row]:
    work = found.work
    yield (
        "work",
        f"{_number(work.image / 1e12)} TFLOP an image: UNet {_number(work.unet_training / 1e12)}, "
        f"autoencoder {_number(work.vae / 1e12)}, text {_number(work.text_encoder / 1e12)}",
    )
    yield "", f"UNet forward {_macs(found)} GMACs, attention's products included"
    whole = work.image * found.global_batch_size
    yield (
        "",
        f"{_number(whole / 1e12)} TFLOP an update"
        + (
            f", {_number(whole / found.num_devices / 1e12)} on each device"
            if found.num_devices > 1
            else ""
        ),
    )
    if work.recomputed:
        share = work.recomputed / work.image
        yield "", f"{share:.0%} more for recomputing: train.remat={found.config.train.remat.name}"


def _speed(found: Estimate) -> Iterator[Row]:
    speed = found.speed
    if speed.roofline is None:
        yield "speed", "unknown: hardware.peak_tflops is not given"
        return
    peak, width = found.config.hardware.peak_tflops, found.config.hardware.hbm_gbps
    limits = f"{peak:g} TFLOP/s" + (f", {width:g} GB/s" if width else "")
    yield (
        "speed",
        f"{_number(speed.roofline)} images/s at most, bound by {speed.bound_by} ({limits})",
    )
    if speed.forecast is not None and speed.anchor is not None:
        yield (
            "",
            f"{_number(speed.forecast)} images/s at {speed.anchor.mfu:.1%} MFU "
            f"({speed.anchor.source})",
        )


def _device(found: Estimate) -> list[Row]:
    held, config = found.device_bytes, found.config
    frozen = "autoencoder" if config.train.text_encoder else "autoencoder and text encoder"
    parts = {
        "weights": (held.weights, ""),
        "average": (held.ema, "train.ema"),
        "optimizer": (held.optimizer, config.optimizer.kind.name),
        "frozen": (held.frozen, frozen),
        "inputs": (held.inputs, "two batches, and one encoded"),
        "step": (held.step.total, _step_text(found)),
        "encode": (held.encode, "estimated; over before the step begins"),
    }
    rows = [(f"  {name}", f"{size(count):>12}  {text}") for name, (count, text) in parts.items()]
    return [
        ("one device", "exact, but where it says estimated"),
        *rows,
        ("  in all", f"{size(held.total):>12}  {_capacity(found)}"),
    ]


def _step_text(found: Estimate) -> str:
    step = found.device_bytes.step
    parts = f"activations {size(step.activations)}, then gradients {size(step.gradients)}"
    return f"estimated for {found.level}: {parts}"


def _capacity(found: Estimate) -> str:
    margin = f"give or take {size(found.margin_bytes)}"
    if found.usable_bytes is None:
        return f"{margin}; the device's memory is not known (hardware.hbm_gib)"
    hardware = found.config.hardware
    is_gpu = hardware.platform is Platform.gpu
    part = f" (programs' part of {hardware.hbm_gib:g} GiB)" if is_gpu else ""
    return f"of {size(found.usable_bytes)}{part}; {margin}"


def _resolutions(found: tuple[Estimate, ...]) -> Iterator[Row]:
    """The same run at several sizes, side by side; the run's own is marked."""
    columns = sorted(found, key=lambda one: one.image[0] * one.image[1])
    own = found[-1]
    heads = [f"{w} x {h}" + ("*" if one is own else "") for one in columns for h, w in [one.image]]
    table = {
        "at (* this run)": heads,
        "  GMACs": [_macs(one) for one in columns],
        "  TFLOP/image": [_number(one.work.image / 1e12) for one in columns],
        "  one device": [size(one.device_bytes.total) for one in columns],
        "  fits": [one.fits for one in columns],
        "  images/s": [_number(s) if (s := one.speed.roofline) else "-" for one in columns],
    }
    for label, cells in table.items():
        yield label, "".join(f"{cell:>14}" for cell in cells)


def _beside(found: Estimate) -> list[Row]:
    host = found.host
    of = "" if host.available is None else f" of {size(host.available)}"
    return [
        ("checkpoint", f"{size(found.checkpoint_bytes)}, uncompressed"),
        ("sharded", f"{found.sharded_share:.2%} of the state's bytes"),
        ("whole", _whole(found)),
        (
            "a host",
            f"about {size(host.total)}{of}: {size(host.process)} for programs, "
            f"{size(host.loading)} while weights",
        ),
        ("", f"are read, {size(host.staging)} while a checkpoint is written"),
    ]


def _whole(found: Estimate) -> str:
    """What of the state lies on every device, and the largest of it where that could be split."""
    arrays = found.placement.whole
    if not arrays:
        return "nothing"
    path, largest = next(iter(arrays.items()))
    told = f"{size(sum(arrays.values()))} in {len(arrays)} arrays"
    if largest < SMALLEST_SHARDED_BYTES:
        return f"{told}, each under {SMALLEST_SHARDED_BYTES // 1024} KiB"
    return f"{told}, the largest {size(largest)}: {path}"


def _compiled(plan: Plan) -> Iterator[Row]:
    compiled = plan.compiled
    if compiled is None:
        return
    versions = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    lower_s = f"{compiled.lower_s:.0f} s"
    if compiled.is_compiled:
        bound = ", an upper bound of what it takes at default" if compiled.level == "O0" else ""
        peak = f"{size(compiled.host_peak_bytes)} of this machine"
        yield "compiled", f"at {compiled.level}{bound}; {versions}"
        yield "", f"lowered in {lower_s}, compiled in {compiled.compile_s:.0f} s with {peak}"
    else:
        yield "lowered", f"in {lower_s}, not compiled; {versions}"
    for name, program in compiled.programs.items():
        yield f"  {name}", _program(program)
        for kind, one in sorted(program.collectives.items(), key=lambda row: -row[1].bytes):
            yield "", f"{size(one.bytes):>12}  {one.count:,} x {kind.replace('_', '-')}"
    if compiled.needed_bytes is not None:
        yield "  in all", f"{size(compiled.needed_bytes):>12}  {_compiler_text(plan, compiled)}"
    for note in compiled.notes:
        yield "", note


def _program(program: CompiledProgram) -> str:
    if program.overflow is not None:
        needs, has = size(program.overflow.needs), size(program.overflow.has)
        return f"{'':>12}  does not fit: needs {needs} of {has}"
    if program.bytes is None:
        return f"{'':>12}  lowered alone"
    held = program.bytes
    flops = "" if program.flops is None else f", {_number(program.flops / 1e12)} TFLOP"
    donated = ", donated" if program.donated else ""
    given = f"arguments {size(held.arguments)}{donated}{flops}"
    return f"{size(held.temporaries):>12}  temporaries; {given}"


def _compiler_text(plan: Plan, compiled: CompiledReport) -> str:
    estimated = plan.estimate.device_bytes.total
    needed = compiled.needed_bytes or 1
    return f"with what lies beside it; the estimate was {estimated / needed - 1:+.0%} off"


def _verdict(plan: Plan) -> Iterator[Row]:
    found = plan.estimate
    if plan.advice:
        words = "it fits with" if plan.fits == "no" else "to be sure"
        for index, one in enumerate(plan.advice):
            other = ", another training" if one.changes_training else ""
            after = f", {one.note}" if one.note else ""
            told = f"{size(one.needs_bytes)}{other}{after}"
            yield (words if index == 0 else "or"), f"{' '.join(one.typed)}  ({told})"
    elif plan.smallest_bytes is not None:
        least = size(plan.smallest_bytes)
        yield "it fits with", f"nothing sdx could change: {least} at the least; larger devices"
    if found.host.fits is False:
        yield "a host", "may have too little memory: see above"
    yield "fits", f"{plan.fits}: {_reason(plan)}"


def _reason(plan: Plan) -> str:
    found, compiled = plan.estimate, plan.compiled
    total, usable = size(found.device_bytes.total), found.usable_bytes
    if usable is None:
        return "hardware.hbm_gib is not given"
    of = f"{total} of {size(usable)} by estimate"
    said = compiler_says(found, compiled)
    if said is not None and compiled is not None and compiled.needed_bytes is not None:
        of += f", {size(compiled.needed_bytes)} by the compiler"
        if plan.fits == "undecided":
            of += ", which differ"
    elif found.fits == "undecided":
        of += ", and its margin decides; compile=true tells more"
    return of


def _macs(found: Estimate) -> str:
    """Multiply-adds of the UNet's forward pass, in billions."""
    macs = found.work.unet_forward / 2e9
    return f"{macs:,.1f}" if macs >= 1 else _number(macs)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
