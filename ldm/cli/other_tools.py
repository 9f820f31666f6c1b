"""Flags of other tools, such as the public Textual Inversion, diffusers and web UIs, and what takes their place here.

People type the flags that they know. `Parser` answers with the flag of this project.
"""
from __future__ import annotations

from collections.abc import Mapping

# The flags of other tools, without dashes -> what this project has in their place. Of several answers, each command
# gives those that it has; one with "=" is an override of the config, which only main.py takes.
_ANSWERS: tuple[tuple[str, str], ...] = (
    # photos and words
    ("train_data_dir instance_data_dir instance_data_root image_dir images_dir input_dir dataset dataset_path "
     "data_dir train_data data photos", "--data_root --photos"),
    ("reg_data_dir class_data_dir reg_dir regularization_dir", "--reg_data_root"),
    ("initializer_token initializer_word initializer_words init_words init_token class_name class_token "
     "super_category supercategory concept_class category class_prompt", "--init_word --super_category"),
    ("placeholder_token placeholder_tokens placeholder_strings modifier_token new_token token token_string "
     "trigger_word keyword identifier", "--placeholder --placeholders"),
    ("instance_prompt", "--placeholder --init_word"),
    ("mask_dir masks_dir mask_root mask_path mask_folder mask_image", "--masks --mask"),
    # the base model and where to go on from
    ("pretrained_model_name_or_path pretrained_model model_id model_path model_name model_name_or_path base_model "
     "model checkpoint ckpt ckpt_path weights load_model", "--actual_resume --ckpt"),
    ("resume_from_checkpoint resume_from resume_path resume_training load_checkpoint", "--resume"),
    ("yaml config_file config_path config cfg_file", "--base --config"),
    ("embeddings embedding learned_embeds learned_embeds_path load_embedding textual_inversion ti delta_ckpt "
     "embedding_manager_ckpt concept_path concepts", "--concept --embedding_path"),
    ("embeddings_paths inputs", "--manager_ckpts"),
    # the schedule of a training run
    ("max_train_steps max_training_steps num_train_steps train_steps num_steps iterations n_steps total_steps steps",
     "--max_steps --ddim_steps --custom_steps"),
    ("num_train_epochs max_train_epochs max_epochs epochs n_epochs", "lightning.trainer.max_epochs="),
    ("train_batch_size batch_size bs batch", "data.params.batch_size= --batch_size"),
    ("gradient_accumulation_steps grad_accum_steps accumulate_grad_batches",
     "lightning.trainer.accumulate_grad_batches="),
    ("learning_rate lr base_learning_rate embedding_lr text_encoder_lr unet_lr value_lr",
     "model.params.embedding_lr= model.params.value_lr= model.base_learning_rate="),
    ("lr_scheduler lr_warmup_steps scheduler_config", "model.params.scheduler_config="),
    ("mixed_precision fp16 bf16 half dtype amp autocast no_half", "--precision"),
    ("gradient_checkpointing", "model.params.unet_config.params.use_checkpoint=true"),
    ("checkpointing_steps save_steps save_every save_every_n_steps save_freq checkpointing_interval",
     "lightning.modelcheckpoint.every_n_train_steps="),
    ("checkpoints_total_limit save_top_k", "lightning.modelcheckpoint.save_top_k="),
    ("dataloader_num_workers num_workers workers n_workers", "data.params.num_workers="),
    ("repeats num_repeats dataset_repeats", "data.params.train.params.repeats="),
    ("resolution image_size img_size size train_resolution", "data.params.train.params.size= --H --W"),
    ("random_flip hflip flip flip_aug flip_p", "data.params.train.params.flip_p="),
    ("validation_prompt validation_prompts sample_prompts save_sample_prompt",
     "lightning.callbacks.previews.params.prompts="),
    ("num_vectors num_vectors_per_token n_vectors num_tokens",
     "model.params.vectors_per_word= model.params.personalization_config.params.num_vectors_per_token="),
    ("prior_loss_weight with_prior_preservation prior_preservation", "model.params.prior_weight="),
    ("num_class_images num_reg_images", "model.params.prior_count="),
    ("bias beta zero_shot_bias", "model.params.bias= --bias"),
    ("temperature tau", "model.params.temperature= --temperature"),
    # generation
    ("loras lora_path lora_paths lora_weights lora_weight lora_model lora_scale network_weights network_mul", "--lora"),
    ("num_inference_steps sampling_steps ddim_step inference_steps sample_steps n_inference_steps",
     "--ddim_steps --custom_steps"),
    ("guidance_scale cfg_scale cfg guidance unconditional_guidance_scale cfg_text", "--scale"),
    ("num_images num_images_per_prompt n_images images_per_prompt num_samples num_outputs count",
     "--n_samples --seeds"),
    ("n_repeats num_batches batch_count", "--n_iter"),
    ("negative neg_prompt negative_prompts n_prompt uncond_prompt uc", "--negative_prompt"),
    ("prompt_file prompts_file prompt_path prompts_path file_prompts prompts prompt_list", "--from-file --prompts"),
    ("text caption", "--prompt"),
    ("sampler_name sampling_method scheduler sampler_type dpm_solver dpm ddim klms euler euler_a heun method",
     "--sampler --plms"),
    ("eta", "--ddim_eta"),
    ("width w", "--W"),
    ("height h", "--H"),
    ("init_image input_image image image_path initial_image input init", "--init-img"),
    ("denoising_strength denoise noise_strength noising_strength", "--strength"),
    ("mask_prompt mask_text", "--mask-word"),
    ("random_seed manual_seed generator_seed", "--seed"),
    # machine and output
    ("gpu gpu_id gpu_ids cuda n_gpus num_gpus num_processes world_size gpus device", "--devices --device"),
    ("output_dir output out out_dir outdir save_dir save_path output_path results_dir log_dir logging_dir log_path "
     "target_path", "--logdir --outdir --output_path --output"),
    ("run_name experiment_name exp_name job_name output_name project_name", "--name"),
)
_NOT_NEEDED = {  # flags that ask for what happens anyway, or for what this project does not have -> what to know
    "attention is efficient already": "xformers enable_xformers_memory_efficient_attention enable_xformers "
                                      "opt_sdp_attention flash_attention attention_slicing sdpa",
    "TensorBoard files are always written to the log folder": "report_to wandb tensorboard log_with use_wandb",
    "the concept is always written as .safetensors": "save_as_full_pipeline save_model_as save_safetensors "
                                                     "safe_serialization",
    "a concept is trained on the base model alone, and --lora of scripts/txt2img.py adds a LoRA to its images":
        "lora network_module",
    "there is no filter to switch off": "disable_safety_checker skip_safety_checker no_nsfw nsfw",
    "no public library of 8-bit optimizers is used; a concept's optimizer takes kilobytes": "use_8bit_adam "
                                                                                           "use_8bit_optimizer",
    "on CUDA it is used where it changes nothing": "allow_tf32 tf32",
    "photos are cached as latents anyway": "cache_latents cache_latents_to_disk",
    "subjects are cut out of photos by themselves": "center_crop random_crop crop_image",
}


def answer_for(flag: str, known: Mapping[str, str], takes_overrides: bool) -> str | None:
    """Return what a command says to a flag of another tool, in half a sentence; None if it has nothing for it.

    Args:
        flag: as typed, such as "--train_data_dir".
        known: the flags of the command, each with the name of the setting that it sets.
        takes_overrides: whether the command takes overrides of its config.
    """
    name = _plain(flag)
    for names, answers in _ANSWERS:
        if name in names.split():
            here = {known[one]: one for one in reversed(answers.split()) if one in known}
            overrides = [one for one in answers.split() if takes_overrides and "=" in one]
            if here or overrides:
                return f"is a flag of other tools; here it is {_listed([*reversed(here.values()), *overrides])}"
    for answer, names in _NOT_NEEDED.items():
        if name in names.split():
            return f"is a flag of other tools; leave it out, {answer}"
    return None


def _plain(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").lower().replace("-", "_").replace(".", "_")


def _listed(answers: list[str]) -> str:
    """Return answers as a text such as "--H or --W"."""
    shown = [f"{one}VALUE" if one.endswith("=") else one for one in answers]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
