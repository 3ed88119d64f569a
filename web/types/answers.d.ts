/** What the server answers below /dreambooth (nodes/host_routes.py, webui/routes.py), and sends (nodes/host_progress.py). */

/** Numbers by step, column by column; null: not finite. */
export interface Points {
  steps: number[];
  losses: (number | null)[];
  rates: (number | null)[];
  scores: ScorePoint[];
}

export interface ScorePoint {
  step: number;
  /** Metric → value. */
  scores: Record<string, number | null>;
}

export interface Preview {
  step: number;
  /** URLs. */
  pictures: string[];
  scores?: Record<string, number | null>;
}

/** What is known of a node: GET /nodes, and a part of every message. */
export interface NodeFacts {
  /** Execution id, composite inside of subgraphs. */
  node: string;
  /** Unix time. */
  at: number;
  /** "starting", a phase's name, "training", "done", "stopped" or "failed". */
  state: string;
  /** Of the run. */
  name: string;
  /** The run's id, once there is one. */
  run?: string;
  step?: number;
  steps?: number;
  /** Of a phase. */
  done?: number;
  total?: number;
  /** Steps per second. */
  rate?: number | null;
  seconds_left?: number | null;
  /** Bytes. */
  memory?: number | null;
  problem?: string;
  remedy?: string;
}

/** GET /job: what is known of a job of the web UI. */
export interface JobFacts extends NodeFacts {
  /** The command of the engine. */
  kind: string;
  points?: Points;
  /** How many previews and validations there were. */
  measured: number;
  warnings: string[];
  /** File name of what it made, once that is in the LoRA folder; "" before. */
  card: string;
  /** The words that call the subject. */
  words: string;
  /** The recommended weight in a prompt. */
  weight: number;
}

/** What a message tells beside the facts. */
export interface Novelties {
  points?: Omit<Points, "scores">;
  preview?: Preview;
  scores?: ScorePoint;
}

/** GET /runs. */
export interface RunSummary {
  id: string;
  name: string;
  base: string;
  /** Unix times. */
  started_at: number;
  changed_at: number;
  step: number;
  steps: number;
  /** "running", "done", "stopped" or "failed". */
  state: string;
  loss: number | null;
  /** URL of the newest one's first picture. */
  preview: string | null;
  problem?: string;
  remedy?: string;
  /** The best step, of a run that looked for one. */
  best?: number;
}

/** GET /runs/{run}. */
export interface RunDetails extends RunSummary {
  settings: Record<string, unknown>;
  adapters: { step: number; file: string; url: string; name: string; bytes: number }[];
  /** Step → URLs. */
  previews: Record<string, string[]>;
  /** URLs of the subject's pictures. */
  subject: string[];
  /** URL. */
  workflow: string | null;
  folder: string;
  bytes: number;
  /** Whether the web UI knows how it was begun; ComfyUI needs its graph instead. */
  resumable?: boolean;
}

/** GET /folders. */
export interface Folders {
  /** What Subject's folder is called while its pictures come from another node. */
  no_folder: string;
  folders: PictureFolder[];
}

export interface PictureFolder {
  name: string;
  /** Whether it is a zip file. */
  archive: boolean;
  /** Pictures in a folder. */
  count: number | null;
}

/** GET /folders/pictures. */
export interface PictureReport {
  pictures: { name: string; caption: string; width: number; height: number; thumbnail: string }[];
  warnings: { picture: string; text: string }[];
  problem: string | null;
}
