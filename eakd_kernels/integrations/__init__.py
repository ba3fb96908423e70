"""Adapters to libraries that train: each module is named after its host, and imports it when it is used.

transformers   EAKDTrainerMixin, for transformers.Trainer and what is derived from it
trl            patch_gkd, patch_distillation: the loss of GKDTrainer and of DistillationTrainer
modelopt       LogitsEAKDLoss, a criterion for NVIDIA ModelOpt
torchdistill   EAKDLoss under that name in torchdistill's registry
recipes        KDLoss, ChunkedKDLoss: the call signatures of NeMo Automodel and torchtune; needs no host
mdistiller     kd_loss, dkd_loss: the functions of mdistiller and the EA-KD repository; needs no host

An adapter raises an error where its host's signature is not the one that it was written for. docs/hosts.md has what
to change in a training script, and which conventions hosts have.
"""
