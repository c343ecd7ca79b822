"""Networks of timm of every family, with seeded random weights, at the smallest images that they take."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 200
EXAMPLES = 2

# family -> the networks' names, and the pixels of a side
FAMILIES: dict[str, dict[str, int]] = {
    "convolutional": {
        "resnet10t": 32,
        "resnetv2_18": 32,
        "resnest14d": 32,
        "res2net50_14w_8s": 32,
        "skresnet18": 32,
        "legacy_seresnet18": 32,
        "regnety_002": 32,
        "cspresnet50": 32,
        "darknet17": 32,
        "densenet121": 32,
        "rdnet_tiny": 32,
        "dla46_c": 32,
        "dpn48b": 32,
        "ese_vovnet19b_slim_dw": 32,
        "hrnet_w18_small": 32,
        "selecsls42": 32,
        "tresnet_m": 32,
        "inception_v3": 80,
        "legacy_xception": 32,
        "eca_nfnet_l0": 32,
        "repvgg_a0": 32,
        "mobileone_s0": 32,
        "mobilenetv3_small_050": 32,
        "mobilenetv4_conv_small_035": 32,
        "efficientnet_b0": 32,
        "efficientnet_lite0": 32,
        "hardcorenas_a": 32,
        "ghostnetv3_050": 48,
        "rexnet_100": 32,
        "hgnetv2_b0": 32,
        "repghostnet_050": 32,
        "fasternet_t0": 32,
        "starnet_s050": 32,
        "convnextv2_atto": 32,
        "inception_next_atto": 32,
        "convmixer_768_32": 32,
        "mambaout_femto": 32,
        "lcnetv2_small": 32,
    },
    "attention": {
        "vit_tiny_patch16_224": 32,
        "deit3_small_patch16_224": 32,
        "cait_xxs24_224": 32,
        "convit_tiny": 32,
        "crossvit_tiny_240": 120,
        "coat_tiny": 32,
        "davit_tiny": 32,
        "eva02_tiny_patch14_224": 32,
        "beit_base_patch16_224": 32,
        "focalnet_tiny_srf": 32,
        "gcvit_xxtiny": 32,
        "hiera_tiny_224": 32,
        "mvitv2_tiny": 32,
        "nest_tiny": 32,
        "pit_ti_224": 32,
        "pvt_v2_b0": 32,
        "swin_tiny_patch4_window7_224": 32,
        "swinv2_cr_tiny_ns_224": 32,
        "swinv2_tiny_window8_256": 32,
        "tnt_s_legacy_patch16_224": 32,
        "twins_svt_small": 32,
        "vit_relpos_small_patch16_224": 32,
        "volo_d1_224": 32,
        "xcit_nano_12_p16_224": 32,
    },
    "hybrid": {
        "levit_128s": 32,
        "maxvit_rmlp_pico_rw_256": 32,
        "coatnet_pico_rw_224": 32,
        "mobilevit_xxs": 32,
        "mobilevitv2_050": 32,
        "mobilenetv4_hybrid_medium": 32,
        "efficientformerv2_s0": 32,
        "efficientformer_l1": 224,
        "efficientvit_b0": 32,
        "efficientvit_m0": 32,
        "fastvit_t8": 32,
        "nextvit_small": 32,
        "caformer_s18": 32,
        "shvit_s1": 32,
        "swiftformer_xs": 32,
        "edgenext_xx_small": 32,
        "tiny_vit_5m_224": 32,
        "visformer_tiny": 32,
        "vitamin_small_224": 32,
        "lambda_resnet26t": 32,
        "botnet26t_256": 32,
        "vit_tiny_r_s16_p8_224": 32,
        "repvit_m1": 32,
        "lowformer_b0": 32,
        "csatv2": 64,
    },
    "mixer": {
        "mixer_s32_224": 32,
        "resmlp_12_224": 32,
        "gmlp_ti16_224": 32,
        "gmixer_12_224": 32,
        "poolformer_s12": 32,
        "convformer_s18": 32,
    },
    "recurrent": {
        "sequencer2d_s": 32,
        "efficientvim_m1": 32,
    },
}


def mend_torchvision() -> ModuleType:
    """torchvision, which timm imports.

    A build for CUDA does not load its compiled operators beside a torch for CPUs, and then fails on their names.
    """
    try:
        import torchvision.datasets
    except RuntimeError:
        names = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.datasets
        import torchvision.models
    return torchvision


def create(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode and two images, the same in every process."""
    mend_torchvision()
    import timm

    def make(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
        return network.eval()

    with torch.random.fork_rng(devices=[]):
        try:
            network = make(img_size=size)
        except TypeError:  # it takes images of any size
            network = make()
        images = torch.randn(EXAMPLES, 3, size, size)
        with torch.no_grad():
            if not network(images).any():  # some are born with a classifier of zeros
                for parameter in network.get_classifier().parameters():  # type: ignore[operator]
                    nn.init.normal_(parameter, std=0.02)
        return network, images
