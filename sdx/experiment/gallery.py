"""Pictures of a run: grids while it trains, and the judgement of its last weights."""

from collections.abc import Callable, Sequence

import numpy as np

from sdx.config.schema import Config
from sdx.data.adherence import Adherence, measure_adherence
from sdx.data.shapes import held_out_prompts
from sdx.parallel.agreement import from_first, is_first
from sdx.pipeline import Params, Pipeline
from sdx.record.metrics import read_metrics
from sdx.record.paths import RunPaths
from sdx.sampling.denoise import SamplingStopped
from sdx.training.pictures import make_grid, plot_loss, save_png, to_uint8
from sdx.training.sinks import MetricSink


class Gallery:
    """Draws with the run's own pipeline; the pictures of a step are drawn once.

    Every process draws, since the weights are shared between them; the first one writes.
    `should_stop` says the same in all of them.
    """

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        pipeline: Pipeline,
        sinks: Sequence[MetricSink],
        should_stop: Callable[[], bool],
    ):
        self._config = config
        self._paths = paths
        self._pipeline = pipeline
        self._sinks = sinks
        self._should_stop = should_stop

    def draw_grid(self, step: int, params: Params) -> None:
        """`samples/<step>.png` and the sinks: one picture of each of `sample.prompts`.

        Asked to stop meanwhile, it draws nothing and returns, so that the loop can save.
        """
        prompts = self._config.sample.prompts
        path = self._paths.samples / f"{step:07d}.png"
        if not prompts or from_first(path.exists):
            return
        try:
            grid = make_grid(self._sample(params, prompts), prompts)
        except SamplingStopped:
            return
        if is_first():
            save_png(grid, path)
            for sink in self._sinks:
                sink.picture(step, "samples", grid)

    def judge(self, params: Params, num_prompts: int) -> Adherence:
        """How well pictures of held-out captions of `data=shapes` show what they say."""
        prompts = held_out_prompts(num_prompts)
        return measure_adherence(self._sample(params, prompts), prompts)

    def plot_loss(self, step: int) -> None:
        """`loss.png` and the sinks: the curve of every row of metrics.jsonl."""
        if not is_first():
            return
        rows = [row for row in read_metrics(self._paths.metrics) if "loss" in row]
        if not rows:
            return
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        curve = plot_loss(steps, losses, title=f"{self._paths.root.name}: training loss")
        save_png(curve, self._paths.loss_plot)
        for sink in self._sinks:
            sink.picture(step, "loss", curve)

    def _sample(self, params: Params, prompts: Sequence[str]) -> np.ndarray:
        sample = self._config.sample
        pipeline = self._pipeline.with_params(params)
        images = pipeline.sample(
            prompts,
            negative_prompts=[sample.negative_prompt],
            num_steps=sample.num_steps,
            guidance_scale=sample.guidance_scale,
            guidance_rescale=sample.guidance_rescale,
            seed=sample.seed,
            should_stop=self._should_stop,
        )
        return to_uint8(images)
