"""Train what a config describes: a concept, a base model, a first stage.

    python main.py --base configs/perfusion.yaml
    python main.py --base configs/perfusion.yaml --data_root photos/ --init_word "teddy bear" --placeholder "<my-teddy>"
"""
from __future__ import annotations

from ldm.cli.training import parse_training_options
from ldm.common.errors import one_line_errors
from ldm.common.lazy_imports import forward_names

# Public configs and scripts name these as `main.…`.
__getattr__ = forward_names(__name__, {
    "CUDACallback": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.data.module",
    "ImageLogger": "ldm.training.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "get_obj_from_str": "ldm.util",
    "get_parser": "ldm.cli.training",
    "instantiate_from_config": "ldm.util",
})


@one_line_errors
def main() -> None:
    options = parse_training_options()  # before torch is imported: --help and mistyped flags are answered at once
    from ldm.training.early_checks import check_files

    check_files(options)
    from ldm.training.plan import plan_run

    plan = plan_run(options)
    if plan.is_finished:
        return
    from ldm.training.run import carry_out

    carry_out(plan)


if __name__ == "__main__":
    main()
