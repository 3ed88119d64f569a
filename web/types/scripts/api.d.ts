/** What the pages use of ComfyUI's scripts/api.js. */

import type { NodeFacts } from "../answers.js";

/** ComfyUI's own messages, and the pack's, by name. */
interface Messages {
  dreambooth: NodeMessage;
  promptQueued: unknown;
  execution_cached: { nodes?: string[] };
  execution_interrupted: unknown;
  execution_error: { node_id: string; exception_message: string };
  reconnected: unknown;
}

export const api: {
  fetchApi(route: string, options?: RequestInit): Promise<Response>;
  apiURL(route: string): string;
  addEventListener<Name extends keyof Messages>(
    name: Name,
    listener: (event: CustomEvent<Messages[Name]>) => void,
  ): void;
};

export type NodeMessage = NodeFacts & import("../answers.js").Novelties;
