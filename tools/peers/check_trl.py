"""TRL: the reward trainer's evaluation, and a step of GRPO with the scalar export as reward model."""

import torch
from datasets import Dataset
from peer import PAIRS, Check, messages, texts_of_pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer


def options(folder):
    return dict(output_dir=str(folder.parents[1] / "trl"), report_to=[], use_cpu=True, bf16=False, save_strategy="no")


def reward_model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def reward_trainer(folder):
    rows = [{"chosen": messages(prompt, a), "rejected": messages(prompt, b)} for prompt, a, b in PAIRS]
    trainer = RewardTrainer(
        model=reward_model(folder),
        args=RewardConfig(**options(folder), per_device_eval_batch_size=3, max_length=None),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for inputs in trainer.get_eval_dataloader():
        with torch.no_grad():
            _, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
        found += outputs.logits.view(2, -1).t().flatten().tolist()
    return texts_of_pairs(), found


def grpo(folder):
    policy = folder.with_name(folder.name.replace("scalar", "causal-lm"))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_funcs=reward_model(folder),
        args=GRPOConfig(
            **options(folder), max_steps=1, num_generations=2, per_device_train_batch_size=4, max_completion_length=8
        ),
        train_dataset=Dataset.from_list([{"prompt": messages(prompt, "")[:1]} for prompt, *_ in PAIRS]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder),
    )
    texts, found, calculate = [], [], trainer._calculate_rewards

    def recorded(inputs, prompts, completions, ids):
        rewards = calculate(inputs, prompts, completions, ids)
        texts.extend((prompt[0]["content"], answer[0]["content"]) for prompt, answer in zip(prompts, completions))
        found.extend(rewards[:, 0].tolist())
        return rewards

    trainer._calculate_rewards = recorded
    trainer.train()
    return texts, found


check = Check("trl")
check.run("scalar", "`RewardTrainer`, conversations", reward_trainer)
check.run("scalar", "`GRPOTrainer(reward_funcs=FOLDER)`, a step", grpo)
check.save("trl")
