/* Data, elements and formats that everything else uses. */
const DATA = JSON.parse(document.getElementById("data").textContent);
const AT = DATA.tiou.indexOf(DATA.at);
const KINDS = {
  "right": { color: "--right", sign: "✓" },
  "duplicate": { color: "--duplicate", sign: "2" },
  "bad boundary": { color: "--boundary", sign: "↔" },
  "wrong label": { color: "--label", sign: "≠" },
  "wrong label and boundary": { color: "--both", sign: "≁" },
  "background": { color: "--background", sign: "∅" },
  "missed": { color: "--missed", sign: "○" },
};
const MEANING = {
  "duplicate": `an event of its class with tIoU ≥ ${DATA.at} that a better prediction already has`,
  "bad boundary": `an event of its class, but with tIoU from 0.1 to ${DATA.at}`,
  "wrong label": `an event of another class with tIoU ≥ ${DATA.at}`,
  "wrong label and boundary": `an event of another class with tIoU from 0.1 to ${DATA.at}`,
  "background": "no event with tIoU ≥ 0.1",
  "missed": "an annotated event that no prediction with the working score has, or is a bad boundary or wrong label of",
};
const TWO = DATA.models.length > 1;
const LETTERS = TWO ? ["A", "B"] : [""];

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
/* Make an element; text children are text, never markup. */
function h(tag, attributes, ...children) { return fill(document.createElement(tag), attributes, children); }
function s(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}
function show(id, ...children) { document.getElementById(id).replaceChildren(...children.flat(Infinity).filter(Boolean)); }
function percent(share, digits = 1) { return share === null || share === undefined ? "–" : (100 * share).toFixed(digits); }
function points(gain) { return `${gain < -0.00005 ? "−" : "+"}${Math.abs(100 * gain).toFixed(1)}`; }
function signed(gain) { return Math.abs(gain) < 0.0005 ? "0.0" : points(gain); }
function seconds(hundredths, digits = 2) { return (hundredths / 100).toFixed(digits); }
function mean(values) { return values.reduce((sum, value) => sum + value, 0) / values.length; }
function swatch(kind) {
  return h("span", { class: "swatch", style: `background: var(${KINDS[kind].color})` + (kind === "missed" ? "; color: var(--paper)" : ""), "aria-hidden": "true" }, KINDS[kind].sign);
}
function modelName(i) {
  const line = h("span", { class: i ? "dash second" : "dash", style: `color: var(--model${i})`, "aria-hidden": "true" });
  return h("span", { class: "name" }, line, TWO ? `${LETTERS[i]}: ` : "", DATA.models[i].name);
}
function bar(share, color) {
  const width = Math.max(0, Math.min(1, share));
  return h("span", { class: "barcell", "aria-hidden": "true" }, h("span", { class: "bar", style: `width: ${(100 * width).toFixed(1)}%; background: var(${color})` }));
}
