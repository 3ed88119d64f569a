// Writes locales/en/main.json from the English texts of the pages: python tools/npm.py run texts

import { writeFileSync } from "node:fs";
import { ENGLISH } from "../web/lib/texts.js";

const path = new URL("../locales/en/main.json", import.meta.url);
writeFileSync(path, `${JSON.stringify({ dreambooth: ENGLISH }, null, 2)}\n`);
