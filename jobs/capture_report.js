"use strict";
// Opens one trait's pictures at a time. Without it every picture opens by its own summary.
(() => {
  const chooser = document.getElementById("trait");
  if (!chooser) return;
  chooser.addEventListener("change", () => {
    for (const picture of document.querySelectorAll("details[data-trait]")) {
      picture.open = chooser.value === "" || picture.dataset.trait === chooser.value;
    }
    for (const block of document.querySelectorAll("div[data-trait]")) {
      block.hidden = chooser.value !== "" && block.dataset.trait !== chooser.value;
    }
  });
  document.getElementById("tools").hidden = false;
})();
