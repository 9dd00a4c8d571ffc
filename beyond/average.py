"""Ours: checkpoints hold a moving average of E and G, because small batches make the weights noisy."""
import torch


def average_decay(decay, step):
    """The decay at this step, which is smaller in the first steps, so that the random start fades."""
    return min(decay, step / (step + 10))


@torch.no_grad()
def update_average(averages, nets, decay):
    """average := decay * average + (1 - decay) * net, for all weights. Buffers are copied."""
    for average, net in zip(averages, nets):
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        for a, b in zip(average.buffers(), net.buffers()):
            a.copy_(b)
