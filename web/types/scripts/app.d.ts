/** What the pages use of ComfyUI's scripts/app.js, and of LiteGraph's nodes. */

export interface Widget {
  name: string;
  value: string;
  label?: string;
  /** In classic nodes. */
  hidden?: boolean;
  options: { values?: string[] | (() => string[]); advanced?: boolean };
  serialize?: boolean;
  callback?(this: unknown, ...args: unknown[]): unknown;
}

export interface Graph {
  nodes: GraphNode[];
  getNodeById(id: number): GraphNode | null | undefined;
  change?(): void;
}

export interface GraphNode {
  comfyClass?: string;
  mode?: number;
  size: [number, number];
  widgets?: Widget[];
  graph?: Graph | null;
  showAdvanced?: boolean;
  subgraph?: Graph;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: object): Widget;
  addWidget(type: string, name: string, value: unknown, callback: () => void, options: object): Widget;
  getSlotFromWidget?(widget: Widget): { link?: number | null } | undefined;
  computeSize(): [number, number];
  setSize(size: [number, number]): void;
  onConfigure?(this: GraphNode, ...args: unknown[]): unknown;
  onAdded?(this: GraphNode, ...args: unknown[]): unknown;
  onRemoved?(this: GraphNode, ...args: unknown[]): unknown;
  onDragOver?(event: DragEvent): boolean;
  onDragDrop?(event: DragEvent): boolean;
}

export const app: {
  graph: Graph;
  rootGraph?: Graph;
  extensionManager: {
    setting?: { get(id: string): string | undefined };
    dialog?: { confirm(question: { title: string; message: string; type: string }): Promise<boolean | null> };
    toast: { add(message: { severity: string; summary: string; detail: string; life: number }): void };
    registerSidebarTab(tab: {
      id: string;
      icon: string;
      title: string;
      tooltip: string;
      type: string;
      render(element: HTMLElement): void;
      destroy(): void;
    }): void;
  };
  registerExtension(extension: {
    name: string;
    init(): Promise<void>;
    setup(): void;
    nodeCreated(node: GraphNode): void;
    afterConfigureGraph(): void;
  }): void;
  loadGraphData(graph: unknown, clean: boolean, restoreView: boolean, name: string): Promise<void>;
  queuePrompt(number: number, batchCount: number): Promise<unknown>;
  refreshComboInNodes(): Promise<void>;
};
