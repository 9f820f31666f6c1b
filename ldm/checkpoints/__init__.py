"""Read weights of any format. No content of a file is executed.

    load.py               loads weights into models; start here
    families.py           identifies the model that weights belong to, and the config that fits
    pickled.py            reads .ckpt files
    diffusers_folder.py   reads diffusers folders; diffusers_names.py converts the names of weights
    packed_tables.py      packs and unpacks word tables
    deferred_init.py      builds models without random initialization
"""
