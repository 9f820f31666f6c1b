"""Read weights of any format. No content of a file is executed.

    load.py               loads weights into models; start here
    read.py               reads files of any format, told by their content
    parts.py              finds U-Net, first stage and text encoder in a file, or takes them from another one
    absent_parts.py       names parts and says which ones a file lacks
    averages.py           chooses between a network's weights and their moving averages
    text_towers.py        brings one or two text encoders of any file under a model's names
    prediction.py         finds out what a network predicts (noise or v) from what its files say
    early_checks.py       checks a checkpoint before torch is imported
    header.py             reads names and shapes only; pickled_header.py does so for .ckpt files
    families.py           identifies the model that weights belong to, and the config that fits
    other_kinds.py        identifies files that are no base model: LoRAs, embeddings, ControlNets, ...
    lora_file.py          reads LoRAs; lora_names.py finds their layers, lora_merging.py adds them to weights
    wrappings.py          finds weights within nested dictionaries and prefixes
    pickled.py            reads .ckpt files
    diffusers_folder.py   reads diffusers folders; diffusers_names.py converts the names of weights
    weight_files.py       finds the files of a network in such a folder
    packed_tables.py      packs and unpacks word tables
    deferred_init.py      builds models without random initialization
"""
