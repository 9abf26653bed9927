"""README.md of an exported folder: what the model is, what was measured and how, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from raysparse import plugins
from raysparse.config import SparseConfig, TrialConfig
from raysparse.diffusion import ddim
from raysparse.errors import UsageError
from raysparse.metrics.protocol import Protocol
from raysparse.train.checks import model_options
from raysparse.train.measured import Fid, Measured


def render(
    config: TrialConfig,
    *,
    trial_id: str,
    step: int,
    measured: Measured,
    unet: str | None,
    pipeline: str | None,
    first_stage: str | None,
    equal_steps: Sequence[int],
) -> str:
    """Markdown with a YAML head, as the Hugging Face hub reads it.

    unet: diffusers' class of the network, None where diffusers has none; pipeline: likewise; first_stage: its identity;
    equal_steps: the numbers of steps at which diffusers' scheduler does what raysparse does.
    """
    title = f"{config.model.name} on {config.data.name}, {_method(config)}"
    sections = [
        f"# {title}",
        f"A diffusion model trained by raysparse: {_sentence(config, measured)}",
        _table("Setting", _settings(config, trial_id, step, first_stage)),
        "## Measured\n\n" + _fids(measured.fids, step),
        "## Size and cost\n\n" + _cost(config, measured),
        "## Use\n\n" + _use(config, unet, pipeline),
    ]
    if unet is not None:
        sections.append("## The same samples as raysparse\n\n" + _same(config, equal_steps))
    sections += ["## Masks\n\n" + _masks(config), "## Data\n\n" + _data(config)]
    head = yaml.safe_dump(_head(config, trial_id, measured, unet), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _head(config: TrialConfig, trial_id: str, measured: Measured, unet: str | None) -> dict[str, Any]:
    classes = getattr(model_options(config), "num_classes", None)
    task = "image-generation" if classes else "unconditional-image-generation"
    head: dict[str, Any] = {
        "library_name": "raysparse" if unet is None else "diffusers",
        **({} if classes else {"pipeline_tag": task}),  # the hub has no tag for pictures by class
        "tags": ["diffusion", *_kind(config.sparse), config.sparse.method, config.model.name, config.data.name],
    }
    metrics = []
    for found in measured.fids:
        how = _in_words(found.protocol)
        metrics.append({"type": "fid", "value": found.fid, "name": f"FID ({how})"})
        if found.kid is not None:
            metrics.append({"type": "kid", "value": found.kid, "name": f"KID ({how})"})
    if metrics:
        dataset = {"name": config.data.name, "type": config.data.name}
        head["model-index"] = [
            {"name": trial_id, "results": [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]}
        ]
    return head


def _method(config: TrialConfig) -> str:
    sparse = config.sparse
    return sparse.method if sparse.sparsity is None else f"{sparse.method}, S = {sparse.sparsity:g}"


def _sentence(config: TrialConfig, measured: Measured) -> str:
    if config.sparse.sparsity is None:
        return "dense."
    share = measured.params_active / measured.params_total
    return (
        f"{_trained(config.sparse)}. {measured.params_active:,} of {measured.params_total:,} "
        f"parameters ({share:.4f}) are active; the others are exact zeros in dense tensors. These are the averaged "
        "(EMA) weights."
    )


def _kind(sparse: SparseConfig) -> list[str]:
    """The tag of what was sparse all along."""
    method = plugins.load("methods", sparse.method).METHOD
    return ["sparse-to-sparse"] if method.sparse and not method.straight_through else []


def _trained(sparse: SparseConfig) -> str:
    """How a sparse model came about: what was dense on the way is told."""
    if _kind(sparse):
        return "sparse from its first step to its last"
    told = ["sparse by masks over dense weights, all of which were trained (straight-through)"]
    if sparse.setting("start") == "teacher":
        told.append("it started from the weights of a dense network")
    patterns: list[tuple[int, int]] = getattr(sparse.settings(), "patterns", list)()
    if len(patterns) > 1:
        told.append(f"its masks grow sparser in stages: {', '.join(f'{n}:{m}' for n, m in patterns)}")
    return "; ".join(told)


def _settings(config: TrialConfig, trial_id: str, step: int, first_stage: str | None) -> dict[str, Any]:
    sparse = config.sparse
    rows = {
        "method": sparse.method,
        "sparsity S": sparse.sparsity,
        "allocation": sparse.allocation,
        "prune ratio p": sparse.prune_ratio,
        "update interval ΔTe": None if sparse.update_interval is None else f"{sparse.update_interval} steps",
        **_other_settings(sparse),
        "seed": config.seed,
        "step": f"{step:,} of {config.train.steps:,}, batch {config.train.batch_size}",
        "timesteps T, betas": (
            f"{config.diffusion.timesteps}, {config.diffusion.beta_schedule} {config.diffusion.beta_start:g} to "
            f"{config.diffusion.beta_end:g}, eps prediction"
        ),
        "sampled with": _sampling(config),
        "first stage, sha256": first_stage and f"`{first_stage}`",
        "trial": f"`{trial_id}`",
    }
    return {name: value for name, value in rows.items() if value is not None}


def _other_settings(sparse: SparseConfig) -> dict[str, Any]:
    """Those of the method that are not its defaults, by their names in a sweep file; the teacher's path is left out."""
    return {f"`{name}`": value for name, value in sorted((sparse.model_extra or {}).items()) if name != "teacher"}


def _sampling(config: TrialConfig) -> str:
    settings = config.evaluate
    guidance = "" if settings.guidance is None else f", guidance {settings.guidance:g}"
    return f"DDIM, {settings.ddim_steps} steps, {settings.timestep_spacing} timesteps, eta {settings.eta:g}{guidance}"


def _fids(fids: Sequence[Fid], step: int) -> str:
    if not fids:
        return f"FID and KID: not measured (there was no record of step {step:,} beside the checkpoint)."
    lines = ["| FID | KID | protocol |", "|---|---|---|"]
    for found in fids:
        kid = "not measured" if found.kid is None else f"{found.kid:.6g} ± {found.kid_std or 0:.2g}"
        lines.append(f"| {found.fid:.6g} | {kid} | {_in_words(found.protocol)} |")
    whole = "\n".join(found.protocol for found in fids)
    note = "FIDs of different protocols do not compare. The protocols in full:"
    return "\n".join(lines) + f"\n\n{note}\n\n```json\n{whole}\n```"


def _in_words(protocol: str) -> str:
    told = Protocol.from_json(protocol)
    guidance = "" if told.guidance is None else f", guidance {told.guidance:g}"
    return (
        f"{told.extractor} {told.layer}, {told.generated} samples against {told.reference_examples} examples, "
        f"DDIM {told.ddim_steps} steps, {told.timestep_spacing} timesteps, eta {told.eta:g}{guidance}"
    )


def _cost(config: TrialConfig, measured: Measured) -> str:
    lines = [
        _table(
            "Parameters",
            {
                "total": f"{measured.params_total:,}",
                "active": f"{measured.params_active:,}",
                "density of the maskable weights": f"{measured.density:.6f}",
            },
        )
    ]
    flops = measured.flops
    if flops is None:
        return lines[0] + "\n\nFLOPs: not counted (they depend on the length of the data's sketches)."
    lines += ["", "| FLOPs | this model | dense | ratio |", "|---|---|---|---|"]
    names = {"inference": "one sample", "train": f"training, {config.train.steps:,} steps"}
    for phase, words in names.items():
        for convention in ("paper", "true"):
            mine, dense = flops[f"flops_{phase}_{convention}"], flops[f"flops_{phase}_dense_{convention}"]
            lines.append(f"| {words}, convention {convention!r} | {mine:.4e} | {dense:.4e} | {mine / dense:.4f} |")
    note = (
        "Weights of convolutions, linear and recurrent layers only. 'true' is 2 FLOPs per multiply-accumulate and "
        "counts every example of a batch; 'paper' is as the papers print it, which leaves the batch size out of "
        "training. They are what the zeros save in arithmetic, not in time: dense kernels do not skip them."
    )
    return "\n".join(lines) + "\n\n" + note


def _use(config: TrialConfig, unet: str | None, pipeline: str | None) -> str:
    steps, eta = config.evaluate.ddim_steps, config.evaluate.eta
    ours = "```bash\nraysparse import THIS_FOLDER --to FOLDER   # masks and weights, bit for bit, for raysparse\n```"
    if unet is None:
        return (
            f"`{config.model.name}` is no model of diffusers: `model.safetensors` holds its weights under raysparse's "
            f"names.\n\n{ours}"
        )
    if pipeline is not None:
        code = [
            f"from diffusers import {pipeline}",
            "",
            f'pipeline = {pipeline}.from_pretrained("THIS_FOLDER")',
            f"picture = pipeline(num_inference_steps={steps}, eta={eta:g}).images[0]",
        ]
        return "```python\n" + "\n".join(code) + f"\n```\n\n{ours}"
    return f"{_conditional(config, unet)}\n\n{ours}"


def _conditional(config: TrialConfig, unet: str) -> str:
    """diffusers has no pipeline for classes by cross-attention: its parts and their loop."""
    options: Any = model_options(config)
    null, width = options.num_classes, options.context_dim
    guidance = config.evaluate.guidance
    code = [
        "import torch",
        f"from diffusers import DDIMScheduler, {unet}" + (", VQModel" if config.first_stage else ""),
        "from safetensors.torch import load_file",
        "",
        f'unet = {unet}.from_pretrained("THIS_FOLDER/unet")',
        'scheduler = DDIMScheduler.from_pretrained("THIS_FOLDER/scheduler")',
        f"embedding = torch.nn.Embedding({null} + 1, {width})  # the last class, {null}, is no class",
        'embedding.load_state_dict(load_file("THIS_FOLDER/class_embedding/model.safetensors"))',
        "",
        "labels = torch.tensor([0])",
        "size = unet.config.sample_size",
        "x = torch.randn(len(labels), unet.config.in_channels, size, size)",
        f"scheduler.set_timesteps({config.evaluate.ddim_steps})",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        "        eps = unet(x, t, embedding(labels)[:, None]).sample",
    ]
    if guidance is not None:
        code += [
            f"        none = unet(x, t, embedding(torch.full_like(labels, {null}))[:, None]).sample",
            f"        eps = none + {guidance:g} * (eps - none)",
        ]
    code.append(f"        x = scheduler.step(eps, t, x, eta={config.evaluate.eta:g}).prev_sample")
    if config.first_stage:
        code.append('    x = VQModel.from_pretrained("THIS_FOLDER/vqvae").decode(x).sample')
    code.append("picture = (x / 2 + 0.5).clamp(0, 1)")
    return (
        "diffusers has no pipeline for a model with classes by cross-attention; its parts do it:\n\n```python\n"
        + "\n".join(code)
        + "\n```"
    )


def _same(config: TrialConfig, equal: Sequence[int]) -> str:
    asked, spacing = config.evaluate.ddim_steps, config.evaluate.timestep_spacing
    done = len(ddim.timesteps(config.diffusion.timesteps, asked, spacing=spacing))
    counts = ", ".join(map(str, equal))
    text = (
        "From the same noise, `scheduler/` (DDIMScheduler) takes the steps that raysparse takes where the number of "
        f"steps is one of: {counts}."
    )
    if asked in equal:
        return text + f" The trial's own, {asked}, is among them."
    return text + (
        f" **The trial's own is not among them**: asked for {asked} steps ({spacing!r}) raysparse does {done}, and no "
        "DDIMScheduler visits the same timesteps. Samples by diffusers at that number are samples of this model, but "
        "not the ones that were measured."
    )


def _masks(config: TrialConfig) -> str:
    if config.sparse.sparsity is None:
        return "The model is dense: `sparsity/masks.safetensors` has no tensors, only facts in its header."
    return (
        "`sparsity/masks.safetensors` says which weights are active, one bit each: uint8 by `numpy.packbits` under the "
        "names of the weights file. Its header has shapes and densities, and the sha256 of the weights that the masks "
        "belong to. An active weight may be 0, so masks cannot be had from the weights."
    )


def _data(config: TrialConfig) -> str:
    try:
        spec = plugins.load("datasets", config.data.name).SPEC
    except UsageError:
        return f"`{config.data.name}`; its licence is not known here."
    cite = f" Cite: {spec.citation}." if spec.citation not in ("", "none") else ""
    return f"{spec.title}. Licence of the data: {spec.licence}.{cite}"


def _table(head: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
