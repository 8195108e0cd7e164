"""The page `--help` prints: what there is to type, and where the outputs go."""

import textwrap
from pathlib import Path

from sdx.config.command_keys import COMMAND_KEYS, keys_of
from sdx.config.folders import default_options, group_options, option_folders
from sdx.config.launching import OPTIONS
from sdx.config.leaves import Leaf, leaves, leaves_of, spelled

_COMMANDS = {
    "train": "train, or continue where a run of the same configuration stopped",
    "plan": "what a configuration needs on its hardware, which need not be here",
    "encode": "encode images once into a cache, to train with data.cache=moments",
    "sample": "draw pictures from a run or a model folder",
    "export": "write a run's model as a folder that diffusers loads",
    "evaluate": "validation loss, FID and CLIP score of a run or a model folder",
    "runs": "what runs and sweeps did: tables, comparison, logs, ending them",
}
_GROUPS = {
    "model": "what is trained",
    "data": "what it is trained on",
    "optimizer": "how weights are updated",
    "lr_schedule": "how the learning rate changes",
    "diffusion": "noise schedule and loss",
    "attention": "attention kernel",
    "mesh": "how devices share the work",
    "hardware": "where it runs; sets mesh, attention and xla",
    "xla": "compiler flags",
    "sampler": "how pictures are drawn",
    "run_on": "where jobs run; sets hardware and, unless local, --multirun",
    "sweep": "keys and the values that jobs take; sets --multirun",
    "experiment": "a recipe: several groups and keys at once",
    "debug": "a preset for looking closer",
}
_CHANGED_MOST = (
    "train.max_steps",
    "train.per_device_batch_size",
    "optimizer.lr",
    "data.dir",
    "data.resolution",
    "checkpoint.every",
    "sample.every",
    "sample.prompts",
    "run.seed",
    "run.output_dir",
)
_SWEEP_KEYS = {
    "sweeper": ("dry_run", "max_parallel", "retry_failed", "objective", "zip"),
    "launcher": ("partition", "timeout_min", "zone", "provisioning"),
}
"""Keys of sweeps and launchers that people change most."""
_PAGE = """\
python -m sdx.{command} [GROUP=OPTION ...] [KEY=VALUE ...] [SWITCH ...]

Without arguments: a tiny model learns coloured shapes on this CPU, in minutes.

Commands
{commands}

Groups: choose one option of each (* is the default)
{groups}

Keys people change most (all of them: docs/config.md)
{keys}
{own}{sweeps}
Switches
  --cfg job         show the composed configuration and stop; --resolve, --package NAME
  --multirun, -m    a sweep: optimizer.lr=1e-5,5e-6 run.seed=0,1
  --from RUN        the configuration saved in a run folder, with KEY=VALUE on top
  --config-dir DIR  more options for the groups; ./conf is searched as well
  --info WHAT       how Hydra composed it: defaults, searchpath, plugins, config
  --help, -h        this page; --hydra-help for Hydra's own

Precedence: command line > debug > experiment > run_on > hardware > the other groups > defaults.

Outputs go to outputs/<model>-<data>-<hash>/ (run.output_dir, run.name): checkpoints/, export/,
samples/, metrics.jsonl, tensorboard/, config.yaml, run.json. The same command goes on there.

Examples
  python -m sdx.train
  python -m sdx.train data=imagefolder data.dir=photos model=sd21_base hardware=gpu_24gb_1
  python -m sdx.plan experiment=finetune_sd21 data.dir=photos hardware=tpu_v4_32 compile=true
  python -m sdx.train experiment=finetune_sd21 data.dir=photos hardware=gpu_a100_8
  python -m sdx.train run_on=slurm_a100 experiment=finetune_sd21 data.dir=photos sweep=lr"""


def page(command: str, config_dir: Path | None = None) -> str:
    """The help of `command`; options are those that are there, the user's own included."""
    return _PAGE.format(
        command=command,
        commands=_table(_COMMANDS),
        groups="\n".join(_groups(config_dir)),
        keys=_table({key: _key_text(leaves()[key]) for key in _CHANGED_MOST}),
        own=_own(command),
        sweeps="" if command in COMMAND_KEYS else _sweeps(),
    )


def _sweeps() -> str:
    """The keys of sweeps, for commands whose jobs are launched."""
    found: dict[str, str] = {}
    for part, names in _SWEEP_KEYS.items():
        keys = {
            name: leaf for cls in OPTIONS[part].values() for name, leaf in leaves_of(cls).items()
        }
        found |= {f"hydra.{part}.{name}": _key_text(keys[name]) for name in names}
    return f"\nSweeps: every combination of values is a job, where run_on says\n{_table(found)}\n"


def _own(command: str) -> str:
    """The keys that `command` alone takes, as a section of the page."""
    keys = {key: _key_text(leaf) for key, leaf in keys_of(command).items()}
    return f"\nKeys of sdx.{command} alone\n{_table(keys)}\n" if keys else ""


def _table(rows: dict[str, str]) -> str:
    width = max(len(name) for name in rows) + 2
    return "\n".join(
        textwrap.fill(
            text,
            width=100,
            initial_indent=f"  {name:<{width}}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    )


def _groups(config_dir: Path | None) -> list[str]:
    defaults = default_options()
    lines = []
    for group, options in group_options(option_folders(config_dir)).items():
        marked = [f"{name}*" if name == defaults.get(group) else name for name in options]
        lines.append((group, f"{_GROUPS.get(group, 'your own')}: {', '.join(marked)}"))
    order = {group: number for number, group in enumerate(_GROUPS)}
    lines.sort(key=lambda line: order.get(line[0], len(order)))
    return [_table(dict(lines))]


def _key_text(leaf: Leaf) -> str:
    unit = f" [{leaf.unit}]" if leaf.unit else ""
    default = "" if leaf.required else f" (default {spelled(leaf.default) or 'empty'})"
    allowed = ("true", "false") if leaf.kind is bool else leaf.choices
    choices = f": {', '.join(allowed)}" if allowed else ""
    return f"{leaf.help.rstrip('.') if choices else leaf.help}{choices}{unit}{default}"
