"""What a training run is made of. Checkpoints hold it: later stages ask nothing, --resume compares."""
from dataclasses import dataclass

from runtime.files import UserError


@dataclass
class Config:
    """Defaults: the paper's (Sec. 3.4, A.4)."""
    image_size: int = 256       # S: a power of two, 64 to 512
    min_channels: int = 64
    max_channels: int = 512     # also N, the size of an embedding
    num_videos: int = 0         # rows of W; D is built with the number that its rank owns
    landmarks: str = "fan"      # the detector that the training data was made with: fan | dlib
    content: str = "vgg"        # the content loss: vgg | squeeze | l1
    match: bool = True          # False: the FF variant, trained without the match loss
    K: int = 8                  # frames per episode that the embedder sees
    lr: float = 5e-5            # of E and G
    lr_d: float = 2e-4          # of D
    ema: float = 0.0            # decay of the moving average of E and G in checkpoints; 0: none
    by_frames: bool = False     # sequences drawn in proportion to their frames, not evenly
    augment: bool = False       # episodes recoloured, half of them mirrored
    psi_gain: float = 1.0       # psi_hat = psi_gain * P e_hat
    stills: float = 0.0         # share of episodes made of one frame, warped K + 1 times
    match_weight: float = 10.0  # of L_MCH
    adversarial_weight: float = 1.0     # of L_ADV
    face: float = 0.0           # weight of the content loss's face term, where there is no VGGFace
    face_vector: float = 1.0    # of the face term's last output, beside 1 of each other
    fix_embedder: bool = False  # E stays as it came
    lips: float = 1.0           # adapt.py draws lips this much farther apart, for a G that opens too little

    def __post_init__(self):
        if self.image_size not in (64, 128, 256, 512):
            raise UserError(f"image size {self.image_size}: it must be 64, 128, 256 or 512")
        if not 8 <= self.min_channels <= self.max_channels:
            channels = f"{self.min_channels} to {self.max_channels}"
            raise UserError(f"channels {channels}: 8 <= min <= max is needed")

    def widths(self, blocks):
        """Output channels of so many downsampling blocks (A.4): 64, 128, 256, 512, 512, 512."""
        widths = [min(self.min_channels * 2 ** k, self.max_channels) for k in range(blocks)]
        return widths[:-1] + [self.max_channels]
