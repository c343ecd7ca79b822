"""Networks of timm of every family, with seeded random weights, at the smallest images that they take."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 200
EXAMPLES = 2

# The pixels of a side, where a network does not take 32.
SIZES = {
    "inception_v3": 80,
    "ghostnetv3_050": 48,
    "crossvit_tiny_240": 120,
    "efficientformer_l1": 224,
    "csatv2": 64,
}
FAMILIES = {
    family: names.split()
    for family, names in {
        "convolutional": """
            resnet10t resnetv2_18 resnest14d res2net50_14w_8s skresnet18 legacy_seresnet18 regnety_002 cspresnet50
            darknet17 densenet121 rdnet_tiny dla46_c dpn48b ese_vovnet19b_slim_dw hrnet_w18_small selecsls42 tresnet_m
            inception_v3 legacy_xception eca_nfnet_l0 repvgg_a0 mobileone_s0 mobilenetv3_small_050
            mobilenetv4_conv_small_035 efficientnet_b0 efficientnet_lite0 hardcorenas_a ghostnetv3_050 rexnet_100
            hgnetv2_b0 repghostnet_050 fasternet_t0 starnet_s050 convnextv2_atto inception_next_atto convmixer_768_32
            mambaout_femto lcnetv2_small
        """,
        "attention": """
            vit_tiny_patch16_224 deit3_small_patch16_224 cait_xxs24_224 convit_tiny crossvit_tiny_240 coat_tiny
            davit_tiny eva02_tiny_patch14_224 beit_base_patch16_224 focalnet_tiny_srf gcvit_xxtiny hiera_tiny_224
            mvitv2_tiny nest_tiny pit_ti_224 pvt_v2_b0 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224
            swinv2_tiny_window8_256 tnt_s_legacy_patch16_224 twins_svt_small vit_relpos_small_patch16_224 volo_d1_224
            xcit_nano_12_p16_224
        """,
        "hybrid": """
            levit_128s maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 mobilevit_xxs mobilevitv2_050
            mobilenetv4_hybrid_medium efficientformerv2_s0 efficientformer_l1 efficientvit_b0 efficientvit_m0
            fastvit_t8 nextvit_small caformer_s18 shvit_s1 swiftformer_xs edgenext_xx_small tiny_vit_5m_224
            visformer_tiny vitamin_small_224 lambda_resnet26t botnet26t_256 vit_tiny_r_s16_p8_224 repvit_m1
            lowformer_b0 csatv2
        """,
        "mixer": "mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224 poolformer_s12 convformer_s18",
        "recurrent": "sequencer2d_s efficientvim_m1",
    }.items()
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


def create(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode and two images, the same in every process."""
    size = SIZES.get(name, 32)
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
            if not network(images).any():  # some begin with a classifier of zeros
                for parameter in network.get_classifier().parameters():  # type: ignore[operator]
                    nn.init.normal_(parameter, std=0.02)
        return network, images
