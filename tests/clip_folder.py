"""A tiny CLIP in transformers' layout, made from a seed."""

import shutil
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY / "sdx" / "assets" / "tiny" / "tokenizer"
IMAGE_SIZE = 32


def make_clip(folder: Path, **text: Any) -> Any:
    """Writes the model and the embedded tokenizer to `folder`; the model, in torch.

    `text` changes its text_config. The weights are larger than transformers', so that scores vary.
    """
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 2}
    vocab = {"vocab_size": 584, "max_position_embeddings": 16, "eos_token_id": 583}
    vocab |= {"bos_token_id": 582, "pad_token_id": 583}
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8}
    config = CLIPConfig(
        text_config=common | vocab | text, vision_config=common | vision, projection_dim=12
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    processor.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return model
