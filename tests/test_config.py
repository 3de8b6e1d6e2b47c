"""TokenFusionConfig: errors state value and limit, slugs are unique, depth_split follows Eq. 7."""

import numpy as np
import pytest

import tofu_sd
from tofu_sd import TokenFusionConfig, recipes
from tofu_sd.core.reductions import mean, mlerp, prune


def test_numpy_dtype_scalars_are_accepted():
    config = TokenFusionConfig(ratio=np.float32(0.25), levels=np.int64(2), sx=np.int64(2), start=np.float64(0.1))
    assert config == TokenFusionConfig(ratio=0.25, levels=2, start=0.1)
    assert config.slug == "tofu-r25-l2-t10to100"


def test_largest_ratio_is_allowed():
    assert TokenFusionConfig(ratio=0.75).num_merged(64, 64) == 3072


def test_unknown_option_raises_with_suggestion():
    with pytest.raises(TypeError, match=r"unknown option 'ration' \(did you mean 'ratio'\?\)"):
        TokenFusionConfig.of(0.5, ration=0.3)


def test_depth_split_follows_equation_7():
    d6 = TokenFusionConfig(depth_split=6)
    assert [d6.reductions_at(depth, 99).tokens for depth in (0, 5, 6, 15)] == [prune, prune, mlerp, mlerp]
    assert [TokenFusionConfig().reductions_at(depth, 6).tokens for depth in (5, 6)] == [prune, mlerp]


def test_num_merged_of_a_thin_grid_is_at_most_its_sources():
    assert TokenFusionConfig(ratio=0.75).num_merged(1, 8) == 4  # 8 tokens, 4 cells of 1 x 2
    assert TokenFusionConfig(ratio=0.75).num_merged(1, 1) == 0


def test_slugs_of_different_settings_differ():
    variants = [
        TokenFusionConfig(),
        TokenFusionConfig(ratio=0.3),
        TokenFusionConfig(proportional=True),
        TokenFusionConfig(kv_only=True),
        TokenFusionConfig(early=mean, late=mean),
        TokenFusionConfig(early=mlerp, late=prune),
        TokenFusionConfig(kv_early=mean),
        TokenFusionConfig(kv_late=mean),
        TokenFusionConfig(kv_early=mean, kv_late=mean),
        TokenFusionConfig(kv_early=prune, kv_late=prune),
        TokenFusionConfig(depth_split=6),
        TokenFusionConfig(levels=2),
        TokenFusionConfig(seed=0),
        TokenFusionConfig(sx=3),
        TokenFusionConfig(sy=3),
        TokenFusionConfig(start=0.2),
        TokenFusionConfig(match_on="normed"),
        TokenFusionConfig(merge_mlp=True),
        TokenFusionConfig(merge_crossattn=True),
    ]
    assert len({v.slug for v in variants}) == len(variants)
    assert TokenFusionConfig().slug == "tofu-r50"
    assert recipes.named("kv:tome+p", 0.75).slug == "kv-mean-r75+p"


def test_recipes_match_the_papers():
    assert recipes.named("tofu") == TokenFusionConfig(early=prune, late=mlerp)
    assert recipes.named("tome", 0.3) == TokenFusionConfig(ratio=0.3, early=mean, late=mean)
    assert recipes.named("kv:mlerp+p") == TokenFusionConfig(early=mlerp, late=mlerp, kv_only=True, proportional=True)


def test_recipe_accepts_options_after_at_sign():
    config = recipes.named("kv:tofu+p@ratio=0.25@early=mlerp@match_on=normed@seed=3")
    assert config == TokenFusionConfig(
        ratio=0.25, early=mlerp, kv_only=True, proportional=True, match_on="normed", seed=3
    )
    with pytest.raises(TypeError, match="did you mean 'levels'"):
        recipes.named("tofu@level=2")
    with pytest.raises(ValueError, match="'levels' in method 'tofu@levels'"):
        recipes.named("tofu@levels")


@pytest.mark.parametrize("name", ["tofo", "tofu+q", "tofu+", "kv:", "kv:kv:tofu", "tofu+p+p"])
def test_unknown_method_raises(name):
    with pytest.raises(ValueError, match="unknown method"):
        recipes.named(name)


def test_package_import_does_not_import_hosts():
    """`import tofu_sd` costs as much as importing torch; diffusers and transformers load with the first model."""
    import subprocess
    import sys

    code = "import sys, tofu_sd; print([m for m in ('diffusers', 'transformers', 'eval') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert tofu_sd.__version__
