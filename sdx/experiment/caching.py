"""Which cache belongs to a configuration: its key is computed from what training would read, never
taken from a file beside the cache."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from sdx.config import resolve
from sdx.config.check import has_effect
from sdx.config.schema import Cache, Config
from sdx.data.cache.records import CONTEXT, MOMENTS, CacheKey, find_cache
from sdx.data.cache.rows import CachedContext, CachedMoments, CachedSource, Records
from sdx.data.cache.staging import local_cache
from sdx.data.source import DataError, Source, first_examples
from sdx.record.store import AnyPath, StoreError, as_path
from sdx.weights.digest import MOMENTS_TENSORS, weights_digest
from sdx.weights.model_files import ModelFiles

_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


def training_source(config: Config, source: Source, weights: ModelFiles) -> Source:
    """What is trained on of the split `source`: its first examples, and from the cache where
    `data.cache` says so. Raises DataError where there is no such cache.
    """
    limit = config.train.max_samples
    used = source if limit is None else first_examples(source, limit)
    if config.data.cache is Cache.none:
        return used
    try:
        return _open_cache(config, used, source, weights)
    except StoreError as error:
        raise DataError(str(error)) from error


def moments_key(config: Config, source: Source, weights: ModelFiles) -> CacheKey:
    """The key of the moments and tokens of `source`."""
    data, draws = config.data, _draws_views(config)
    vae = {name: value for name, value in asdict(config.model.vae).items() if name in _ENCODER}
    return CacheKey(
        MOMENTS,
        {
            "examples": source.fingerprint,
            "num_examples": len(source),
            "resolution": resolve.resolution(config),
            "center_crop": data.center_crop,
            "random_flip": data.random_flip,
            "interpolation": (
                data.interpolation.name if has_effect(config, "data.interpolation") else None
            ),
            "views": num_views(config),
            "seed of the views": config.run.seed if draws else None,
            "vae": weights_digest(weights, "vae", vae, MOMENTS_TENSORS),
            "computed in": resolve.activations_dtype(config),
            "tokenizer": _tokenizer_digest(config, weights.tokenizer_folder()),
        },
    )


def context_key(config: Config, moments: CacheKey, weights: ModelFiles) -> CacheKey:
    """The key of the text states of the captions in that cache of moments."""
    architecture = asdict(config.model.text_encoder)
    return CacheKey(
        CONTEXT,
        {
            "moments": moments.name,
            "text_encoder": weights_digest(weights, "text_encoder", architecture),
            "computed in": resolve.activations_dtype(config),
            **({"padding": "marked"} if config.attention.mask_padding_tokens else {}),
        },
    )


def num_views(config: Config) -> int:
    """Views of each image."""
    return config.data.cache_views or 1


def cache_folder(config: Config) -> AnyPath:
    """The folder of caches."""
    return as_path(config.data.cache_dir)


_ENCODER = ("in_channels", "latent_channels", "block_out_channels", "layers_per_block",
            "norm_num_groups")  # fmt: skip


def _draws_views(config: Config) -> bool:
    return config.data.random_flip or not config.data.center_crop


def _open_cache(config: Config, used: Source, whole: Source, weights: ModelFiles) -> CachedSource:
    """The cache of the examples used, or else that of all."""
    place, key = cache_folder(config), moments_key(config, used, weights)
    try:
        folder = find_cache(place, key)
    except DataError:
        if len(used) == len(whole):
            raise
        parts = {"examples": whole.fingerprint, "num_examples": len(whole)}
        of_all = replace(key, parts={**key.parts, **parts})
        if not (place / of_all.name / "index.json").is_file():
            raise
        key, folder = of_all, place / of_all.name
    moments = CachedMoments(Records(local_cache(folder), key.digest))
    if config.data.cache is Cache.moments:
        return CachedSource(used, moments)
    key = context_key(config, key, weights)
    folder = local_cache(find_cache(place, key))
    return CachedSource(used, moments, CachedContext(Records(folder, key.digest)))


def _tokenizer_digest(config: Config, folder: Path) -> str:
    digest = hashlib.sha256(str(config.model.text_encoder.max_position_embeddings).encode())
    for file in sorted(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
