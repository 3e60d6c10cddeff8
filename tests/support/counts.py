"""Parameters of the published models, counted on the original PyTorch classes.

Encoder, decoder and codebook for a first stage; the UNet; and the conditioner, without
the output layer over the vocabulary that the original text transformers carry unused. A
class embedding has one row more here than latent-diffusion's `cin256`: the null class.
"""

from typing import NamedTuple


class LdmCounts(NamedTuple):
    """Parameters of a diffusion model.

    Attributes:
      first_stage: The config of its autoencoder.
      unet: Of the UNet.
      conditioner: Of the class embedding, text transformer or rescaler.
    """

    first_stage: str
    unet: int
    conditioner: int


AUTOENCODERS = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
}

LDMS = {
    "celebahq256_vq4": LdmCounts("vq_f4", 274_056_163, 0),
    "ffhq256_vq4": LdmCounts("vq_f4", 274_056_163, 0),
    "lsun_bedrooms256_vq4": LdmCounts("vq_f4", 274_056_163, 0),
    "lsun_churches256_kl8": LdmCounts("kl_f8", 294_966_916, 0),
    "imagenet256_vq8": LdmCounts("vq_f8", 394_984_196, 512 * 1001),
    "imagenet256_vq4_cfg": LdmCounts("vq_f4", 400_920_579, 512 * 1001),
    "text2img256_vq4": LdmCounts("vq_f4", 403_623_939, 186_154_682 - 19_564_602),
    "text2img256_kl8_1p4b": LdmCounts("kl_f8", 872_300_484, 581_994_042 - 39_098_682),
    "sr_bsr_x4": LdmCounts("vq_f4", 113_622_563, 0),
    "inpaint_big": LdmCounts("vq_f4_noattn", 387_245_827, 0),
    "semantic256": LdmCounts("vq_f4", 215_229_315, 182 * 3),
    "semantic512": LdmCounts("vq_f4", 215_229_315, 182 * 3),
    "layout256": LdmCounts("vq_f4", 246_277_379, 58_858_496 - 4_202_496),
    "rdm768": LdmCounts("kl_f16", 1_335_480_400, 0),
    "sd15": LdmCounts("kl_f8", 859_520_964, 123_060_480),
    "sd21_base": LdmCounts("kl_f8", 865_910_724, 352_984_064),
    "sd21_v": LdmCounts("kl_f8", 865_910_724, 352_984_064),
}
