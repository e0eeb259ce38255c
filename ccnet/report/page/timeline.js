/* One video on a timeline: a lane a class with annotated and predicted events, the gates below, all on one axis. */
const ROW = 17, GAP = 3, GATES = 96, AXIS = 24;

/* Split a flat list of numbers. */
function rows(flat, width) {
  const found = [];
  for (let i = 0; i < flat.length; i += width) found.push(flat.slice(i, i + width));
  return found;
}

function unpack(video) {
  if (video.annotated) return video;
  video.annotated = rows(video.truth, 3).map(([start, end, label], number) => ({ start, end, label, number, model: -1,
    missed: video.models.map((model) => model.missed.includes(number)) }));
  video.predicted = video.models.map((model, m) => rows(model.events, 6).map(([start, end, label, score, kind, target], number) =>
    ({ start, end, label, score, kind: DATA.kinds[kind], target: target < 0 ? null : video.annotated[target], model: m, number })));
  return video;
}

function tiou(a, b) {
  const overlap = Math.max(0, Math.min(a.end, b.end) - Math.max(a.start, b.start));
  return overlap / (a.end - a.start + b.end - b.start - overlap || 1);
}

/* Put events that overlap into different rows, the best ones first. */
function inRows(events) {
  const found = [];
  for (const event of events) {
    let row = found.find((others) => others.every((other) => other.end <= event.start || other.start >= event.end));
    if (!row) found.push(row = []);
    row.push(event);
  }
  return found;
}

function describe(event) {
  const name = DATA.classes[event.label], span = `${seconds(event.start)} to ${seconds(event.end)} s`;
  if (event.model < 0) {
    const by = event.missed.map((missed, m) => (missed ? `missed${TWO ? ` by ${LETTERS[m]}` : ""}` : null)).filter(Boolean).join(", ");
    return `annotated: ${name}, ${span}${by ? ` (${by})` : ""}`;
  }
  const about = event.target ? `; closest event: ${DATA.classes[event.target.label]}, ${seconds(event.target.start)} to ${seconds(event.target.end)} s, tIoU ${tiou(event, event.target).toFixed(2)}` : "";
  return `${TWO ? `${LETTERS[event.model]}: ` : ""}${name}, ${span}, score ${(event.score / 1000).toFixed(3)}: ${event.kind}${about}`;
}

/* Times at round distances. */
function ticks(from, to, count) {
  const raw = (to - from) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  const found = [];
  for (let t = Math.ceil(from / step) * step; t <= to + 1e-9; t += step) found.push(t);
  return found;
}

function decode(text) { return Uint8Array.from(atob(text), (character) => character.charCodeAt(0)); }

/* Draw a video into an SVG of some width.
   view: from, to (hundredths of seconds); keep(event): whether a prediction is shown; chosen: event or null. */
function timeline(video, width, view, keep, chosen, onChoose) {
  unpack(video);
  const narrow = width < 520, left = narrow ? 46 : 150, right = 12;
  const x = (t) => left + (t - view.from) / (view.to - view.from) * (width - left - right);
  const clip = (t) => Math.min(Math.max(x(t), left), width - right);
  const parts = [], drawn = [];
  const predicted = video.predicted.map((events) => events.filter(keep));
  const annotated = video.annotated.filter((event) => view.label === null || event.label === view.label);
  const labels = [...new Set([...annotated, ...predicted.flat()].map((event) => event.label))].sort((a, b) => a - b);
  let y = 6;

  function box(event, top) {
    if (event.end < view.from || event.start > view.to) return;
    const from = clip(event.start), to = Math.max(clip(event.end), from + 2);
    const truth = event.model < 0;
    const missed = truth && event.missed.some(Boolean);
    const color = truth ? "var(--truth)" : `var(${KINDS[event.kind].color})`;
    const group = s("g", { class: "event", "data-kind": truth ? (missed ? "missed" : "annotated") : event.kind, "data-model": event.model, onclick: (click) => { click.stopPropagation(); onChoose(event); } },
      s("title", {}, describe(event)),
      s("rect", { x: from, y: top, width: to - from, height: ROW - 2, rx: 2, fill: missed ? "var(--paper)" : color, "fill-opacity": truth || missed ? 1 : 0.35 + 0.65 * event.score / 1000,
        stroke: missed ? "var(--missed)" : color, "stroke-width": missed ? 1.6 : 1, "stroke-dasharray": missed ? "4 3" : null, class: event === chosen ? "chosen" : null }));
    const text = truth ? (missed ? `${KINDS.missed.sign} missed${TWO ? ` by ${event.missed.map((m, i) => (m ? LETTERS[i] : "")).join("")}` : ""}` : "") : `${KINDS[event.kind].sign} ${(event.score / 1000).toFixed(2)}`;
    if (text && to - from > 8 + 6.4 * text.length) group.append(s("text", { x: from + 4, y: top + ROW - 6, style: "font-size: 11px; pointer-events: none" + (missed ? "" : "; paint-order: stroke; stroke: var(--paper); stroke-width: 2.5px") }, text));
    else if (!truth && to - from > 12) group.append(s("text", { x: from + 2, y: top + ROW - 6, style: "font-size: 11px; pointer-events: none; paint-order: stroke; stroke: var(--paper); stroke-width: 2.5px" }, KINDS[event.kind].sign));
    parts.push(group);
    drawn.push(event);
  }

  for (const label of labels) {
    const begin = y;
    const lane = s("rect", { class: "lane", x: 0, y: begin, width, height: 0 });
    parts.push(lane);
    y += GAP + (narrow ? 14 : 0);
    const groups = [["truth", inRows(annotated.filter((event) => event.label === label))],
      ...predicted.map((events, m) => [TWO ? LETTERS[m] : "found", inRows(events.filter((event) => event.label === label))])];
    groups.forEach(([name, lines], g) => {
      parts.push(s("text", { class: "soft", x: left - 6, y: y + ROW - 5, "text-anchor": "end", style: "font-size: 10px" }, g ? name : "truth"));
      for (const events of lines.length ? lines : [[]]) {
        events.forEach((event) => box(event, y));
        y += ROW;
      }
    });
    lane.setAttribute("height", y - begin + GAP - 1);
    const name = DATA.classes[label], room = Math.floor((narrow ? width - 12 : left - 44) / 6.6);
    parts.push(s("text", { x: 6, y: begin + GAP + (narrow ? 9 : ROW - 5) }, s("title", {}, name), name.length > room ? `${name.slice(0, room - 1)}…` : name));
    y += GAP * 2;
  }
  if (!labels.length) {
    parts.push(s("text", { class: "soft", x: left, y: y + 14 }, "no event with this score, class and kind"));
    y += 26;
  }

  const gates = video.gates.map((curves, m) => curves && { m, start: 100 * curves.start, step: 100 * curves.step, audio: decode(curves.audio), visual: decode(curves.visual) }).filter(Boolean);
  if (gates.length) {
    const values = gates.flatMap((curves) => [...curves.audio, ...curves.visual]).map((value) => value / 255);
    const middle = (Math.min(...values) + Math.max(...values)) / 2, half = Math.max((Math.max(...values) - Math.min(...values)) / 2, 0.05) * 1.1;
    const low = Math.max(0, middle - half), high = Math.min(1, middle + half);
    const top = y + (narrow ? 22 : 8), level = (value) => top + (1 - (value - low) / (high - low)) * GATES;
    for (const value of ticks(low, high, 3)) {
      parts.push(s("line", { class: "axis", x1: left, x2: width - right, y1: level(value), y2: level(value) }),
        s("text", { class: "soft", x: left - 6, y: level(value) + 4, "text-anchor": "end", style: "font-size: 10px" }, value.toFixed(2)));
    }
    parts.push(s("text", { x: 6, y: narrow ? top - 8 : top + 12 }, "gates"));
    for (const curves of gates) {
      for (const [name, dash] of [["audio", "6 3"], ["visual", null]]) {
        const places = [...curves[name]].map((value, i) => [curves.start + i * curves.step, value / 255]).filter(([t]) => t >= view.from - curves.step && t <= view.to + curves.step);
        parts.push(s("path", { class: `gate ${name}`, d: places.map(([t, value], i) => `${i ? "L" : "M"}${clip(t).toFixed(1)} ${level(value).toFixed(1)}`).join(""), fill: "none",
          stroke: `var(--${name})`, "stroke-width": curves.m ? 1.2 : 2, "stroke-dasharray": dash, "stroke-opacity": curves.m ? 0.75 : 1 },
        s("title", {}, `${TWO ? `${LETTERS[curves.m]}: ` : ""}gate from the ${name === "audio" ? "audio" : "video"}`)));
      }
    }
    y = top + GATES + 4;
  }
  for (const t of ticks(view.from / 100, view.to / 100, Math.max(2, (width - left) / 90))) {
    parts.push(s("line", { class: "axis", x1: x(100 * t), x2: x(100 * t), y1: 0, y2: y }), s("text", { class: "soft", x: x(100 * t), y: y + 15, "text-anchor": "middle" }, `${Number(t.toFixed(2))} s`));
  }
  const head = s("line", { class: "playhead", x1: 0, x2: 0, y1: 0, y2: y, stroke: "var(--ink)", "stroke-width": 1.5, visibility: "hidden" });
  const axisFirst = parts.filter((part) => part.tagName === "rect"), lines = parts.filter((part) => part.getAttribute("class") === "axis");
  const others = parts.filter((part) => !axisFirst.includes(part) && !lines.includes(part));
  const drawing = s("svg", { class: "timeline", width, height: y + AXIS, viewBox: `0 0 ${width} ${y + AXIS}`, role: "application", tabindex: 0,
    "aria-label": `Timeline of ${video.id}` }, axisFirst, lines, others, head);
  return {
    drawing,
    drawn: drawn.sort((a, b) => a.start - b.start || a.model - b.model),
    time: (pixel) => view.from + (pixel - left) / (width - left - right) * (view.to - view.from),
    left,
    playhead(t) {
      const inside = t !== null && t >= view.from && t <= view.to;
      head.setAttribute("visibility", inside ? "visible" : "hidden");
      if (inside) { head.setAttribute("x1", x(t)); head.setAttribute("x2", x(t)); }
    },
  };
}
