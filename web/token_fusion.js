// Workflows store the values of a node's widgets in their order. Those from before "preset", which is the first of
// them, had 14 values, and all of these counted.
import { app } from "../../scripts/app.js";

const WIDGETS_BEFORE_PRESET = 14;

export function addPreset(graph) {
  const subgraphs = graph.definitions?.subgraphs ?? [];
  for (const { nodes } of [graph, ...subgraphs]) {
    for (const node of nodes ?? []) {
      const values = node.widgets_values;
      if (node.type === "TokenFusion" && Array.isArray(values) && values.length === WIDGETS_BEFORE_PRESET) {
        values.unshift("custom");
      }
    }
  }
}

app.registerExtension({ name: "tofu_sd.presets", beforeConfigureGraph: addPreset });
