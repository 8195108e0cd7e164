"""A plan as one line of JSON for machines; null is what is not known."""

import json
from typing import Any

from sdx.planning.collectives import Collective
from sdx.planning.compiled import CompiledProgram, CompiledReport
from sdx.planning.estimate import MARGIN, Estimate
from sdx.planning.verdict import Plan, compiler_says

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


def to_json(plan: Plan) -> str:
    """One line; bytes are of one device unless their name says otherwise."""
    return json.dumps(_plan(plan), allow_nan=False)


def _plan(plan: Plan) -> dict[str, Any]:
    found, compiled = plan.estimate, plan.compiled
    hardware = found.config.hardware
    answer = compiled if compiled is not None and compiled.is_compiled else None
    return {
        "model": found.config.model.name,
        "hardware": hardware.name,
        "num_devices": found.num_devices,
        "num_hosts": hardware.num_hosts,
        "mesh": found.mesh,
        "parameters": _trained(found),
        "parameters_by_network": vars(found.parameters),
        "global_batch_size": found.global_batch_size,
        "per_device_batch_size": found.per_device_batch_size,
        "gradient_accumulation": found.config.train.gradient_accumulation,
        "image": list(found.image),
        "bytes_per_device": _device_bytes(found),
        "available_bytes_per_device": found.usable_bytes,
        "margin": MARGIN,
        "fits": plan.fits,
        "fits_analytic": found.fits,
        "fits_compiled": compiler_says(found, compiled),
        "advice": [{"overrides": list(one.typed), "bytes_per_device": one.needs_bytes,
                    "changes_training": one.changes_training} for one in plan.advice],
        "flops_per_image": found.work.image,
        "flops_per_step": found.work.image * found.global_batch_size,
        "unet_forward_flops": found.work.unet_forward,
        "images_per_s_roofline": found.speed.roofline,
        "bound_by": found.speed.bound_by,
        "images_per_s_forecast": found.speed.forecast,
        "mfu_assumed": found.speed.anchor.mfu if found.speed.anchor else None,
        "checkpoint_bytes": found.checkpoint_bytes,
        "replicated_bytes": sum(found.placement.whole.values()),
        "replicated_arrays": len(found.placement.whole),
        "host_memory_bytes": found.host.total,
        "host_fits": found.host.fits,
        "resolutions": [_at(one) for one in plan.others],
        "optimization_level": found.level,
        "collectives": _collectives(answer) if answer else None,
        "compiled": None if compiled is None else _compiled(compiled),
        "compile_s": answer.compile_s if answer else None,
        "host_peak_bytes": None if compiled is None else compiled.host_peak_bytes,
        "notes": [*plan.notes, *(compiled.notes if compiled else ())],
    }  # fmt: skip


def _trained(found: Estimate) -> int:
    more = found.parameters.text_encoder if found.config.train.text_encoder else 0
    return found.parameters.unet + more


def _device_bytes(found: Estimate) -> dict[str, int]:
    held = found.device_bytes
    return {
        "parameters": held.weights,
        "ema": held.ema,
        "optimizer": held.optimizer,
        "frozen": held.frozen,
        "inputs": held.inputs,
        "activations": held.step.activations,
        "gradients": held.step.gradients,
        "step_temporaries": held.step.total,
        "encode_temporaries": held.encode,
        "total": held.total,
    }


def _at(found: Estimate) -> dict[str, Any]:
    return {
        "image": list(found.image),
        "bytes_per_device": found.device_bytes.total,
        "fits": found.fits,
        "flops_per_image": found.work.image,
        "unet_forward_flops": found.work.unet_forward,
        "images_per_s_roofline": found.speed.roofline,
    }


def _collectives(compiled: CompiledReport) -> dict[str, dict[str, int]]:
    """Of both programs together, each kind with its number and bytes; kinds that none has are 0."""
    total = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for program in compiled.programs.values():
        for kind, one in program.collectives.items():
            row = total.setdefault(kind.replace("-", "_"), {"count": 0, "bytes": 0})
            row["count"] += one.count
            row["bytes"] += one.bytes
    return total


def _compiled(compiled: CompiledReport) -> dict[str, Any]:
    return {
        "is_compiled": compiled.is_compiled,
        "optimization_level": compiled.level,
        "versions": compiled.versions,
        "needed_bytes": compiled.needed_bytes,
        "lower_s": compiled.lower_s,
        "programs": {name: _program(one) for name, one in compiled.programs.items()},
    }


def _program(program: CompiledProgram) -> dict[str, Any]:
    def row(one: Collective) -> dict[str, int]:
        return {"count": one.count, "bytes": one.bytes}

    return {
        "bytes": None if program.bytes is None else vars(program.bytes),
        "needs_bytes": program.overflow.needs if program.overflow else None,
        "has_bytes": program.overflow.has if program.overflow else None,
        "flops_per_device": program.flops,
        "collectives": {kind: row(one) for kind, one in program.collectives.items()},
        "donated": program.donated if program.bytes else None,
        "compile_s": program.compile_s,
    }
