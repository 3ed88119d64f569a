"""What a picture is drawn from. The last prompts are kept encoded, by their text and the names of their LoRAs."""

from typing import ClassVar


class StableDiffusionProcessing:
    cached_uc: ClassVar = [None, None]
    cached_c: ClassVar = [None, None]


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_uc: ClassVar = [None, None]
    cached_hr_c: ClassVar = [None, None]
