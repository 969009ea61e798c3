// One job on a ComfyUI server: queue it, follow it over the websocket, and ask /history where the websocket was away.
import type { MakeUrl, MeshOutput } from "../comfy/api";
import { words } from "./words";
import { titleOf, type Graph } from "./workflow";

export interface HistoryEntry {
  prompt: [number, string, Graph, Record<string, unknown>, string[]];
  outputs: Record<string, MeshOutput>;
  status?: { status_str: string; completed: boolean; messages: [string, Record<string, unknown>][] };
}

export interface JobEvents {
  /** What is computed now and how far it is (0 to 1; null where the node does not say). */
  progress(stage: string, fraction: number | null): void;
  picture(image: Blob): void;
  /** A node of the job is done, or was cached, and has something to show; heard again when the job ends, even badly. */
  output(node: string, classType: string | undefined, output: MeshOutput): void;
  server(sentence: string): void;
}

interface Message {
  type: string;
  data: Record<string, unknown> & { prompt_id?: string; node?: string | null };
}

const POLL_MS = 2000;

export class Jobs {
  readonly clientId: string;
  private socket: WebSocket | null = null;
  private current: { id: string; graph: Graph; wake: () => void } | null = null;

  constructor(private readonly api: MakeUrl, private readonly events: JobEvents) {
    this.clientId = sessionStorage.getItem("triptych.client") ?? crypto.randomUUID?.() ?? String(Math.random()).slice(2);
    sessionStorage.setItem("triptych.client", this.clientId);
    this.connect(500);
  }

  /** Queues a graph, or only what its node ``target`` needs; resolves with its id. Raises Error with the sentences of the
   * nodes that refuse their inputs. */
  async queue(graph: Graph, target?: string): Promise<string> {
    const part = target ? { partial_execution_targets: [target] } : {};
    const answer = await this.post("/prompt", { prompt: graph, client_id: this.clientId, ...part });
    const body = (await answer.json()) as QueueAnswer;
    const refused = Object.values(body.node_errors ?? {}).length > 0;
    if (!answer.ok || refused || !body.prompt_id) throw new Error(refusal(body, graph));
    return body.prompt_id;
  }

  /** Waits for the end; resolves with the history entry. Raises Error with the sentence of a failure. */
  async follow(id: string, graph: Graph): Promise<HistoryEntry> {
    try {
      for (;;) {
        const woken = new Promise<void>(wake => { this.current = { id, graph, wake }; });
        const entry = await this.history(id);
        if (entry) return this.finished(entry);
        if (!(await this.isWaiting(id))) {
          // It may have ended between the two questions.
          const late = await this.history(id);
          if (late) return this.finished(late);
          throw new Error(words.lostJob);
        }
        await Promise.race([woken, new Promise(done => setTimeout(done, POLL_MS))]);
      }
    } finally {
      this.current = null;
    }
  }

  /** Takes a job out of the queue, or interrupts it when it runs. */
  async stop(id: string): Promise<void> {
    await this.post("/queue", { delete: [id] });
    await this.post("/interrupt", { prompt_id: id });
  }

  async recent(): Promise<[string, HistoryEntry][]> {
    const answer = await fetch(this.api("/history?max_items=64")).catch(() => null);
    if (!answer?.ok) return [];
    return Object.entries((await answer.json()) as Record<string, HistoryEntry>).reverse();
  }

  async history(id: string): Promise<HistoryEntry | null> {
    const answer = await fetch(this.api(`/history/${id}`)).catch(() => null);
    if (!answer?.ok) return null;
    return ((await answer.json()) as Record<string, HistoryEntry>)[id] ?? null;
  }

  /** Also true while the server cannot be asked. */
  async isWaiting(id: string): Promise<boolean> {
    const answer = await fetch(this.api("/queue")).catch(() => null);
    if (!answer?.ok) return true;
    const { queue_running, queue_pending } = (await answer.json()) as Record<string, [number, string][]>;
    return [...(queue_running ?? []), ...(queue_pending ?? [])].some(item => item[1] === id);
  }

  private async post(path: string, body: unknown): Promise<Response> {
    const init = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(this.api(path), init).catch(() => null);
    if (!answer) throw new Error(words.noAnswer);
    return answer;
  }

  private connect(wait: number): void {
    const url = new URL(this.api("/ws"), location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("clientId", this.clientId);
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => { wait = 500; this.events.server(words.connected); };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.text(data) : this.binary(data as ArrayBuffer));
    socket.onclose = () => {
      this.events.server(words.notConnected);
      setTimeout(() => this.connect(Math.min(8000, wait * 2)), wait);
    };
    this.socket = socket;
  }

  /** For tests: drops the connection as a network would. */
  drop(): void {
    this.socket?.close();
  }

  /** The messages of the websocket may have been missed, so all outputs are told once more. Raises Error as `follow`. */
  private finished(entry: HistoryEntry): HistoryEntry {
    for (const [node, output] of Object.entries(entry.outputs)) this.output(entry.prompt[2], node, output);
    return succeeded(entry);
  }

  private output(graph: Graph, node: string, output: MeshOutput): void {
    this.events.output(node, graph[node]?.class_type, output);
  }

  private text(raw: string): void {
    const { type, data } = JSON.parse(raw) as Message;
    if (type === "status") return this.status(data);
    const job = this.current;
    if (!job || (data.prompt_id && data.prompt_id !== job.id)) return;
    if (type === "executing" && data.node) this.events.progress(titleOf(job.graph, data.node), null);
    if (type === "progress") {
      const [value, max] = [Number(data.value), Number(data.max)];
      this.events.progress(titleOf(job.graph, String(data.node ?? "")), max > 0 ? value / max : null);
    }
    if (type === "executed" && data.output) this.output(job.graph, String(data.node), data.output as MeshOutput);
    const ends = ["execution_success", "execution_error", "execution_interrupted"].includes(type);
    if (ends || (type === "executing" && data.node === null)) job.wake();
  }

  private status(data: Record<string, unknown>): void {
    const waiting = (data.status as { exec_info?: { queue_remaining?: number } } | undefined)?.exec_info?.queue_remaining ?? 0;
    this.events.server(waiting ? words.inQueue(waiting) : words.connected);
  }

  /** Preview pictures: event 1 has a type word before the picture, event 4 a length and JSON. Both are big-endian. */
  private binary(data: ArrayBuffer): void {
    if (!this.current || data.byteLength < 8) return;
    const view = new DataView(data);
    const event = view.getUint32(0);
    if (event === 1) this.events.picture(new Blob([data.slice(8)], { type: view.getUint32(4) === 2 ? "image/png" : "image/jpeg" }));
    if (event === 4) {
      const length = view.getUint32(4);
      const { image_type } = JSON.parse(new TextDecoder().decode(data.slice(8, 8 + length))) as { image_type?: string };
      this.events.picture(new Blob([data.slice(8 + length)], { type: image_type ?? "image/jpeg" }));
    }
  }
}

interface QueueAnswer {
  prompt_id?: string;
  error?: { message?: string; details?: string } | string;
  node_errors?: Record<string, { class_type: string; errors: { type: string; message: string; details: string }[] }>;
}

function refusal({ error, node_errors }: QueueAnswer, graph: Graph): string {
  const missing = Object.entries(node_errors ?? {}).flatMap(([id, { errors }]) =>
    errors.map(({ type, message, details }) => {
      // A node's own sentence stands in the details; ComfyUI's are a message about the input that the details name.
      const sentence = type === "custom_validation_failed" ? details : [message, details && `(${details})`].filter(Boolean).join(" ");
      return `${titleOf(graph, id)}: ${sentence}`;
    }));
  if (missing.length) return missing.join("\n");
  if (typeof error === "string") return error;
  return [error?.message, error?.details].filter(Boolean).join(": ") || words.noReason;
}

function succeeded(entry: HistoryEntry): HistoryEntry {
  const messages = new Map(entry.status?.messages ?? []);
  if (messages.has("execution_interrupted")) throw new Error(words.stopped);
  const failure = messages.get("execution_error");
  if (failure) throw new Error(`${titleOf(entry.prompt[2], String(failure.node_id))}: ${String(failure.exception_message).trim()}`);
  return entry;
}
