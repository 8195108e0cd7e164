"""An estimate as a table for people."""

from typing import assert_never

from sdx.planning.estimate import GIB, Estimate

MIB = 2**20


def render(estimate: Estimate) -> str:
    """The estimate as lines of a label and a value, the verdict last."""
    title = f"{estimate.model} on {estimate.hardware}"
    rows = [*_rows(estimate), ("fits", _verdict(estimate))]
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def _rows(estimate: Estimate) -> list[tuple[str, str]]:
    held, parameters = estimate.device_bytes, estimate.parameters
    mesh = " x ".join(f"{axis} {size}" for axis, size in estimate.mesh.items())
    text_encoder = "trained" if estimate.trains_text_encoder else "frozen"
    hosts = f"{estimate.num_hosts} host{'s' * (estimate.num_hosts > 1)}"
    return [
        ("devices", f"{estimate.num_devices} on {hosts}, mesh {mesh}"),
        ("UNet", f"{parameters.unet:,} parameters, trained"),
        ("autoencoder", f"{parameters.vae:,} parameters, frozen"),
        ("text encoder", f"{parameters.text_encoder:,} parameters, {text_encoder}"),
        ("batch", _batch(estimate)),
        ("work", _work(estimate)),
        ("speed", _speed(estimate)),
        ("checkpoint", f"{_size(estimate.checkpoint_bytes)}, uncompressed"),
        ("sharded", f"{estimate.sharded_share:.2%} of the state's bytes"),
        ("one device", f"{_size(held.total):>10}{_capacity(estimate)}, activations not counted"),
        ("  weights", f"{_size(held.weights):>10}"),
        ("  average", f"{_size(held.ema):>10}"),
        ("  optimizer", f"{_size(held.optimizer):>10}"),
        ("  gradients", f"{_size(held.gradients):>10}"),
        ("  frozen", f"{_size(held.frozen):>10}"),
    ]


def _batch(estimate: Estimate) -> str:
    pieces = estimate.gradient_accumulation
    split = f" in each of {pieces} micro-steps" if pieces > 1 else ""
    side = estimate.resolution
    return (
        f"{estimate.global_batch_size} images of {side} x {side} a step, "
        f"{estimate.per_device_batch_size:g} on each device{split}"
    )


def _work(estimate: Estimate) -> str:
    whole, part = estimate.flops_per_step, estimate.flops_per_device
    return f"{_number(whole / 1e12)} TFLOP a step, {_number(part / 1e12)} on each device"


def _speed(estimate: Estimate) -> str:
    if estimate.max_images_per_s is None:
        return "unknown: hardware.peak_tflops is not given"
    images, peak = _number(estimate.max_images_per_s), estimate.peak_tflops
    return f"below {images} images/s, every device at its peak of {peak:g} TFLOP/s"


def _capacity(estimate: Estimate) -> str:
    return "" if estimate.hbm_bytes is None else f" of {_size(estimate.hbm_bytes)}"


def _verdict(estimate: Estimate) -> str:
    match estimate.fits:
        case "no":
            spread = estimate.num_devices > 1 and estimate.mesh["fsdp"] == 1
            fix = "mesh=fsdp spreads the state" if spread else "it takes more or larger devices"
            return f"no, even without activations; {fix}"
        case "undecided":
            return "undecided: activations come on top and are not estimated yet"
        case "unknown":
            return "unknown: hardware.hbm_gib is not given"
    assert_never(estimate.fits)


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
