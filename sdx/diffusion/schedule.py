"""The noise schedule: tables of beta and its cumulative product, and what follows from them per
timestep.

Source: Ho et al. 2020, arXiv 2006.11239, equations 4 and 8. The tables equal diffusers' to the last
bit: its `scaled_linear` is a float32 `torch.linspace` between the square roots, squared, and its
cumulative product is accumulated in float64 and rounded once. Rescaled to zero terminal SNR they
equal them as far as torch's square root on CPU, which is not rounded correctly, lets them.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdx.config.schema import BetaSchedule, DiffusionConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """Beta and the cumulative product of 1 - beta, float32, one value per timestep; 0 is nearly
    clean."""

    betas: Float[np.ndarray, " t"]
    alphas_cumprod: Float[np.ndarray, " t"]

    @property
    def num_timesteps(self) -> int:
        """Length of the schedule; timesteps are 0 to this, exclusive."""
        return len(self.betas)

    def coefficients(
        self, timesteps: Int[Array, " b"]
    ) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
        """sqrt(a_t) and sqrt(1 - a_t), the shares of signal and noise at `timesteps`."""
        alphas_cumprod = jnp.asarray(self.alphas_cumprod)[timesteps][:, None, None, None]
        return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)

    def add_noise(
        self,
        latents: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
        timesteps: Int[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """x_t = sqrt(a_t) * latents + sqrt(1 - a_t) * noise."""
        signal, sigma = self.coefficients(timesteps)
        return signal * latents + sigma * noise

    def snr(self, timesteps: Int[Array, " b"]) -> Float[Array, " b"]:
        """Signal-to-noise ratio a_t / (1 - a_t) at `timesteps`; 0 where a_t is 0."""
        alphas_cumprod = jnp.asarray(self.alphas_cumprod)[timesteps]
        return alphas_cumprod / (1 - alphas_cumprod)


def make_schedule(diffusion: DiffusionConfig) -> NoiseSchedule:
    """The schedule that `diffusion.beta_*`, `.num_train_timesteps` and
    `.rescale_zero_terminal_snr` describe."""
    start, end, length = diffusion.beta_start, diffusion.beta_end, diffusion.num_train_timesteps
    match diffusion.beta_schedule:
        case BetaSchedule.linear:
            betas = _linspace(start, end, length)
        case BetaSchedule.scaled_linear:
            betas = _linspace(start**0.5, end**0.5, length) ** 2
    if diffusion.rescale_zero_terminal_snr:
        betas = _rescaled(betas)
    return NoiseSchedule(betas, _cumulative(1 - betas))


def _linspace(start: float, end: float, length: int) -> Float[np.ndarray, " t"]:
    """torch.linspace in float32: each half is counted from its own end, with one rounding a
    value."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(length - 1))
    index = np.arange(length)
    rising = np.float64(first) + step * index
    falling = np.float64(last) - step * (length - 1 - index)
    return np.where(index < length // 2, rising, falling).astype(np.float32)


def _rescaled(betas: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Betas whose last timestep is pure noise: sqrt(a_t) is shifted to end at 0, then stretched to
    start where it did (Lin et al. 2023, arXiv 2305.08891, algorithm 1); float32 throughout."""
    signal = np.sqrt(_cumulative(1 - betas))
    stretched = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alphas_cumprod = stretched**2
    alphas = np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1])
    return 1 - alphas


def _cumulative(alphas: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)
