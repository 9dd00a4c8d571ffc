"""Ours: checkpoints hold a moving average of E and G, because small batches make the weights noisy."""
import torch


def average_decay(decay, step):
    """Shorter in the first steps, so that the random start fades."""
    return min(decay, step / (step + 10))


@torch.no_grad()
def update_average(averages, nets, decay):
    """a := decay a + (1 - decay) p of all weights; spectral normalisation's vectors are taken as they are."""
    for average, net in zip(averages, nets):
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        for a, b in zip(average.buffers(), net.buffers()):
            a.copy_(b)
