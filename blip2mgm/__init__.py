"""Does enhancing captions with BLIP-2 make a LoRA-tuned vision-language model better?"""

__version__ = "0.1.0"
