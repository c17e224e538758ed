"""Loading a causal language model and its tokeniser from a folder, and putting adapters on it."""

import warnings
from pathlib import Path

import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.backends import native
from lora_kernels.finetune.errors import UsageError, one_line
from lora_kernels.finetune.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(settings: Settings) -> torch.device:
    """The device that `--device` names.

    Raises:
        UsageError: there is no such device, or the package was built without kernels for it.
    """
    name = settings.device
    built = bool(native._C.cuda_archs)
    if name == "auto":
        return torch.device("cuda" if built and torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UsageError(
            f"argument --device: got {name}, but this torch ({torch.__version__}) sees no CUDA device"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"argument --device: got {name}, expected an index below {torch.cuda.device_count()}, the number "
            "of CUDA devices"
        )
    if not built:
        raise UsageError(
            f"argument --device: got {name}, but lora_kernels was built without CUDA (no nvcc was found)"
        )
    return device


def load_model(folder: Path, dtype: str) -> nn.Module:
    """The model in evaluation mode, on the CPU. Nothing is downloaded and no code of the folder is run.

    Args:
        dtype: float32, bfloat16, float16, or auto: what the folder's files have.

    Raises:
        UsageError: the folder cannot be loaded, in the first line of what transformers says about it.
    """
    import transformers

    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a folder with a wrong value makes of transformers
        raise UsageError(
            f"argument --model: {folder} cannot be loaded as a causal language model: {one_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with noise
        raise UsageError(
            f"argument --model: the weights in {folder} lack {len(missing)} of the model's tensors: "
            f"{missing[0]} for one"
        )
    broken = next((name for name, p in model.named_parameters() if not _finite(p.detach())), None)
    if broken is not None:
        raise UsageError(
            f"argument --model: the weights in {folder} hold a NaN or an infinity: {broken} does"
        )
    if model.dtype not in DTYPES.values():
        raise UsageError(
            f"argument --model: {folder} has dtype {model.dtype}, expected one of {', '.join(DTYPES)}"
        )
    return model.eval()


def _finite(tensor: torch.Tensor) -> bool:
    """Without a temporary of the tensor's size; a NaN is the minimum of everything."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))


def load_tokenizer(folder: Path):
    """The folder's tokeniser.

    Raises:
        UsageError: there is none, or config.json, which tells its kind, has a value that cannot be.
    """
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise UsageError(
            f"argument --model: {folder} has no usable config.json: {one_line(error)}"
        ) from error
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise UsageError(f"argument --model: {folder} has no usable tokenizer: {one_line(error)}") from error


def check_seq_len(model: nn.Module, seq_len: int) -> None:
    """Refuse rows longer than the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UsageError(
            f"argument --seq-len: got {seq_len}, expected at most {limit}, the model's longest input"
        )


def check_token(model: nn.Module, token: int, folder: Path) -> None:
    """Refuse a tokenizer whose largest `token` the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if token >= rows:
        raise UsageError(
            f"argument --model: the tokenizer in {folder} gives token {token}, but the model has embeddings "
            f"for 0 to {rows - 1}: they do not belong together"
        )


def target_modules(text: str) -> str | list[str]:
    """--target-modules as `inject` takes it: all-linear, a list of names, or a regular expression."""
    text = text.strip()
    if text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",") if name.strip()]
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    return names if plain else text


def quantize_argument(settings: Settings) -> str | None:
    """--quantize as the package's functions take it."""
    return None if settings.quantize == "none" else settings.quantize


def add_adapters(model: nn.Module, settings: Settings, device: torch.device) -> list[str]:
    """Inject the adapters, the base quantised on `device`; the names of the layers that got one.

    Raises:
        UsageError: no layer matches --target-modules, or a layer cannot be adapted.
    """
    try:
        return lk.inject(
            model,
            target_modules(settings.target_modules),
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.use_rslora,
            quantize=quantize_argument(settings),
            quantize_device=device,
            adapter_dtype=torch.float32,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"argument --target-modules: got {settings.target_modules!r}: {one_line(error)}"
        ) from error


def pad_id(tokenizer, model: nn.Module) -> int:
    """A token to fill rows with. Which one does not matter: it is no target, and no target looks at it.

    Some tokenizers have one that was added after the model's embeddings were made.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((t for t in candidates if t is not None and t < rows), 0)


@torch.no_grad()
def sample(
    model: nn.Module, prompt: torch.Tensor, tokens: int, end: int | None, seed: int, check_stop
) -> list[int]:
    """Continue `prompt` [length] by up to `tokens` tokens drawn at temperature 0.8 from the likeliest 95 %.

    Drawn with a generator of its own, so that a sample never moves the training's random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    device = prompt.device
    past, feed, drawn = None, prompt[None], []
    for _ in range(tokens):
        check_stop()
        out = model(input_ids=feed, past_key_values=past, use_cache=True)
        probabilities = torch.softmax(out.logits[0, -1].float().cpu() / 0.8, dim=-1)  # [vocabulary]
        ordered, ids = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(0) - ordered > 0.95] = 0
        token = int(ids[torch.multinomial(ordered, 1, generator=generator)])
        drawn.append(token)
        if token == end:
            break
        past = out.past_key_values
        following = torch.tensor([[token]], device=device)
        feed = following if past is not None else torch.cat([feed, following], dim=1)
    return drawn


def silence_libraries() -> None:
    """Keep the screen to what this command says; the libraries' advice is for their own users."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\.|$)")
