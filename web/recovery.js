// The settings of saving sampled latents. model_loaders/recovery_settings.py reads them and has the same defaults.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "CogX.Recovery",
  settings: [
    {
      id: "CogX.Recovery.MinimumSeconds",
      category: ["CogX", "Recovery", "MinimumSeconds"],
      name: "Save sampled latents of runs over (seconds)",
      tooltip: "Shorter runs are not saved, unless they go on from a saved latent.",
      type: "number",
      attrs: { min: 0, max: 86400, step: 1 },
      defaultValue: 60,
    },
    {
      id: "CogX.Recovery.Keep",
      category: ["CogX", "Recovery", "Keep"],
      name: "Saved latents to keep",
      tooltip: "The newest ones; older ones are deleted. Finished runs and stopped ones are counted apart.",
      type: "number",
      attrs: { min: 1, max: 100, step: 1 },
      defaultValue: 5,
    },
    {
      id: "CogX.Recovery.Enabled",
      category: ["CogX", "Recovery", "Enabled"],
      name: "Save sampled latents",
      tooltip: "In output/cogx_recovery, so that a failed decode or a crash loses no render. CogVideoX Load Latent " +
        "brings them back.",
      type: "boolean",
      defaultValue: true,
    },
  ],
});
