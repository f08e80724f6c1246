"use strict";
// The slider: one picture above the other, the upper one cut off at the border. Pictures come from the page's cells.
(() => {
  const part = id => document.getElementById(id);
  const section = part("compare");
  if (!section) return;
  const [crop, left, right, at, before, after, edge] = ["crop", "left", "right", "at", "before", "after", "edge"].map(part);
  const source = label =>
    document.querySelector(`img[data-crop="${crop.value}"][data-label="${CSS.escape(label)}"]`);
  const show = () => {
    for (const [image, choice, tag] of [[before, left, part("near")], [after, right, part("far")]]) {
      image.src = source(choice.value).src;
      image.alt = tag.textContent = choice.value;
    }
    move();
  };
  const move = () => {
    before.style.clipPath = `inset(0 ${100 - at.value}% 0 0)`;
    edge.style.left = `${at.value}%`;
    at.setAttribute("aria-valuetext", `${at.value} % ${left.value}`);
  };
  section.hidden = false;
  left.selectedIndex = 0;
  right.selectedIndex = Math.max(0, right.options.length - 2); // the last is the target
  const preferred = [...right.options].findIndex(option => option.text.includes("(self)"));
  if (preferred >= 0) right.selectedIndex = preferred;
  for (const choice of [crop, left, right]) choice.addEventListener("change", show);
  at.addEventListener("input", move);
  show();
})();
