"""Checkpoints: what a training leaves for the later stages, and what a person file holds."""
import warnings
from dataclasses import asdict, replace

import torch
from torch import nn

from model import Config, Discriminator, Embedder, Generator
from runtime.files import UserError, pass_on_want_of_memory, save_tensors

FORMAT = 2  # raised whenever an older file can no longer be read


def make_config(**values):
    """A Config. UserError where the values do not fit together."""
    try:
        return Config(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def save_checkpoint(path, kind, config, step=0, run=None, **parts):
    """Write a flat dict of tensors and plain values that loads under weights_only=True, atomically.

    kind "meta": E=, G=, V= modules, w0=, b= tensors.  "person": as finetune.save_person says.
    A module's tensors are stored under "NAME.key", a tensor under its name.
    run: plain values that name the training run, which --resume compares.
    """
    state = {"format": FORMAT, "kind": kind, "step": step, "config": asdict(config), "run": run or {}}
    for name, part in parts.items():
        tensors = part.state_dict(prefix=f"{name}.") if isinstance(part, nn.Module) else {name: part}
        state |= {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    save_tensors(state, path)


def load_checkpoint(path, device="cpu", kind="meta"):
    """Read what save_checkpoint wrote: the flat dict, "config" a Config. UserError otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):  # on foreign pickles, which we refuse below
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:  # torch.load raises a dozen types on damaged or foreign files
        pass_on_want_of_memory(e)
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from None
    if not isinstance(state, dict) or not {"format", "kind", "config"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}, and this version reads format {FORMAT}: "
                        "make it anew, or use the version that wrote it")
    if state["kind"] != kind:
        origin = {"meta": "meta_train.py", "person": "finetune.py or infer.py --save-person"}[kind]
        raise UserError(f"{path} is a {state['kind']} file; a {kind} file is needed, from {origin}")
    try:
        state["config"] = Config(**state["config"])
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} has a config that this version does not know: {e}") from None
    return state


def _fill(module, state, prefix=""):
    try:
        part = {k: state[prefix + k] for k in module.state_dict()}
        module.load_state_dict(part)
    except (KeyError, RuntimeError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise UserError(f"the checkpoint does not fit its own config: {reason}") from None
    return module.to(next(iter(part.values())).device).eval()


def load_networks(state):
    """E, G, D of a "meta" checkpoint, in eval mode; D without W, which only the training keeps."""
    config = state["config"]
    E = _fill(Embedder(config), state, "E.")
    G = _fill(Generator(config), state, "G.")
    D = Discriminator(replace(config, num_videos=0))
    return E, G, _fill(D, state | {"W": D.W.detach()})


def load_person(state):
    """G (folded, without P) and psi' (|psi_hat|,) of a loaded "person" checkpoint."""
    G = Generator(state["config"])
    G.P = nn.Identity()  # psi' has taken its place (Sec. 3.3)
    return _fill(G.fold(), state, "G."), state["psi"]
