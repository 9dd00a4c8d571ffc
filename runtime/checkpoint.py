"""Checkpoints of the training, which the later stages read, and person files of the fine-tuning."""
import warnings
from dataclasses import asdict, replace

import torch
from torch import nn

from model import Config, Discriminator, Embedder, Generator
from runtime.files import UserError, raise_if_out_of_memory, save_tensors

FORMAT = 2  # the version of the format, which increases when older files can no longer be read


def make_config(**values):
    """-> a Config. Raises UserError if the values do not fit together."""
    try:
        return Config(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def save_checkpoint(path, kind, config, step=0, run=None, **parts):
    """Write a flat dict of tensors and plain values, which can be loaded with weights_only=True.

    kind: "meta", with the parts E, G, V (modules), w0 and b (tensors), or "person", with the parts that
    finetune.save_person() gives. A module's tensors are stored under "NAME.key", and a tensor under its name.
    run: plain values that describe the training run, which --resume compares.
    Raises UserError if the file cannot be written.
    """
    state = {"format": FORMAT, "kind": kind, "step": step, "config": asdict(config), "run": run or {}}
    for name, part in parts.items():
        tensors = part.state_dict(prefix=f"{name}.") if isinstance(part, nn.Module) else {name: part}
        state |= {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    save_tensors(state, path)


def load_checkpoint(path, device="cpu", kind="meta"):
    """-> the dict that save_checkpoint() wrote, with a Config as its "config", and the "path".

    Raises UserError if the file is missing, damaged, of another kind or from another version.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of other programs, which fail below
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:  # torch.load raises a dozen types for damaged files and files of other kinds
        raise_if_out_of_memory(e)
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__}): name a file that "
                        "meta_train.py or finetune.py wrote") from None
    if not isinstance(state, dict) or not {"format", "kind", "config"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this project: name a file that meta_train.py or "
                        "finetune.py wrote")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}, but this version reads format {FORMAT}: "
                        "make the file again, or use the version that wrote it")
    if state["kind"] != kind:
        needed = {"meta": "a checkpoint of meta_train.py",
                  "person": "a person file of finetune.py or infer.py --save-person"}[kind]
        raise UserError(f"{path} is a file of another kind ({state['kind']}): {needed} is needed here")
    try:
        state["config"] = Config(**state["config"])
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} has a config that this version cannot use ({e}): make it again") from None
    return state | {"path": str(path)}


def _fill(module, state, prefix=""):
    """Load the tensors with this prefix into a module. Returns it in eval mode on the tensors' device."""
    try:
        part = {k: state[prefix + k] for k in module.state_dict()}
        module.load_state_dict(part)
    except (KeyError, RuntimeError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise UserError(f"{state['path']} is damaged, or does not fit its own config ({reason}): make it "
                        "again") from None
    return module.to(next(iter(part.values())).device).eval()


def load_networks(state):
    """-> E, G, D of a loaded "meta" checkpoint, in eval mode. Checkpoints have no rows of W, nor has D."""
    config = state["config"]
    E = _fill(Embedder(config), state, "E.")
    G = _fill(Generator(config), state, "G.")
    D = Discriminator(replace(config, num_videos=0))
    return E, G, _fill(D, state | {"W": D.W.detach()})


def load_person(state):
    """-> G (folded, without P, in eval mode) and psi' (|psi_hat|,) of a loaded "person" checkpoint."""
    G = Generator(state["config"])
    G.P = nn.Identity()     # psi' replaces its output (Sec. 3.3)
    return _fill(G.fold(), state, "G."), state["psi"]
