"""ms-swift has the image token's id of the original vocabulary written into its template; this model has another."""

import json
import os
from pathlib import Path

from swift.template.templates.qwen import Qwen2VLTemplate

config = json.loads((Path(os.environ["SPEED_MODEL"]) / "config.json").read_text())
Qwen2VLTemplate.image_token_id = config["image_token_id"]
Qwen2VLTemplate.video_token_id = config["video_token_id"]
