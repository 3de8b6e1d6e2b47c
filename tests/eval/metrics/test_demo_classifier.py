"""Metrics of the embedded model's classifier."""

from __future__ import annotations

import torch
from eval_run import ToyClassifier
from metric_inputs import random_images

from eval.metrics import base, demo_classifier

CPU = torch.device("cpu")


def test_demo_classifier_metrics_are_zero_on_equal_images():
    pair, of_sets = demo_classifier.pd_demo(ToyClassifier(), CPU), demo_classifier.fd_demo(ToyClassifier(), CPU)
    assert pair.compute(random_images(), random_images()).tolist() == [0, 0]
    assert (pair.compute(random_images(), random_images(seed=1)) > 0).all()
    assert of_sets.features.compute(random_images(3)).shape == (3, 3)
    kernel = demo_classifier.kd_demo(ToyClassifier(), CPU)
    assert kernel.distance(*[kernel.features.compute(random_images(3))] * 2) == 0
    for metric in (pair, of_sets, kernel):
        assert metric.name.endswith("-demo")
        assert "LPIPS" not in metric.name + metric.implementation
        assert "FID" not in metric.name + metric.implementation


def test_perceptual_distance_ignores_feature_norms():
    a = random_images().clamp(0, 100)
    twice = 2 * a
    assert demo_classifier.pd_demo(ToyClassifier(), CPU).compute(a, twice).max() < 1e-10


def test_class_accuracy_counts_images_with_all_labels_right():
    from tofu_sd.demo.scene_classes import CLASSES

    shown = random_images(3)
    shown[:, 0, 0, 0] = torch.tensor([5, 6, 7], dtype=torch.uint8)
    asked = [CLASSES[5].prompt, CLASSES[6].prompt, CLASSES[9].prompt]
    metric = demo_classifier.class_accuracy(ToyClassifier(), asked, CPU)
    assert metric.compute(shown, asked).tolist() == [1, 1, 0]


def test_demo_classifier_works_with_its_metrics():
    from tofu_sd.demo.classifier import DemoClassifier
    from tofu_sd.demo.scene_classes import CLASSES

    asked = [kind.prompt for kind in CLASSES[:2]]
    pair, of_sets, share = demo_classifier.demo_classifier_metrics(DemoClassifier().eval(), asked, CPU)
    assert (pair.compute(random_images(), random_images(seed=1)) > 0).all()
    assert of_sets.features.compute(random_images()).shape == (2, 144)
    assert share.compute(random_images(), asked).shape == (2,)


def test_class_accuracy_of_unknown_prompts_is_skipped():
    assert isinstance(demo_classifier.class_accuracy(ToyClassifier(), ["a red fox"], CPU), base.Skipped)


def test_metrics_disable_tf32_and_restore_it():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before, seen = [switch.allow_tf32 for switch in switches], []

    class Looking(ToyClassifier):
        def features(self, images):
            seen.extend(switch.allow_tf32 for switch in switches)
            return super().features(images)

    try:
        for switch in switches:
            switch.allow_tf32 = True
        demo_classifier.fd_demo(Looking(), CPU).features.compute(random_images())
        assert seen == [False, False]
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was
