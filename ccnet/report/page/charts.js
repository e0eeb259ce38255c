/* Charts with two axes from 0 to 1. */
function square(title, xName, yName, marks) {
  const size = 300, left = 44, top = 10, right = 12, bottom = 40;
  const x = (value) => left + value * size, y = (value) => top + (1 - value) * size;
  const grid = [0, 0.2, 0.4, 0.6, 0.8, 1].map((value) => [
    s("line", { class: "axis", x1: x(value), x2: x(value), y1: y(0), y2: y(1) }),
    s("line", { class: "axis", x1: x(0), x2: x(1), y1: y(value), y2: y(value) }),
    s("text", { class: "soft", x: x(value), y: y(0) + 15, "text-anchor": "middle" }, value.toFixed(1)),
    s("text", { class: "soft", x: x(0) - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1)),
  ]);
  return s("svg", { viewBox: `0 0 ${left + size + right} ${top + size + bottom}`, width: left + size + right, role: "img", "aria-label": title },
    grid, marks(x, y),
    s("text", { x: x(0.5), y: y(0) + 33, "text-anchor": "middle" }, xName),
    s("text", { transform: `translate(12 ${y(0.5)}) rotate(-90)`, "text-anchor": "middle" }, yName));
}

function line(places, model) {
  return s("path", { d: places.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""), fill: "none", stroke: `var(--model${model})`,
    "stroke-width": 2.2, "stroke-dasharray": model ? "7 4" : null, class: `curve model${model}` });
}

/* Precision over recall of one class, as the steps whose area is the AP. */
function precisionRecall(index) {
  return square(`Precision and recall of ${DATA.classes[index]}`, "recall", "precision", (x, y) => DATA.models.map((model, i) => {
    const [recall, precision] = model.curves[index];
    const places = [];
    let before = 0;
    recall.forEach((r, k) => {
      places.push([x(before / 1000), y(precision[k] / 1000)], [x(r / 1000), y(precision[k] / 1000)]);
      before = r;
    });
    if (places.length) places.push([x(before / 1000), y(0)]);
    return line(places, i);
  }));
}

/* Precision of predictions over their score, a dot a bin; its area stands for the number of predictions. */
function reliability(model, i) {
  const most = Math.max(...model.bins.map(([count]) => count), 1);
  return square(`Calibration of ${model.name}`, "score", `precision at tIoU ${DATA.at}`, (x, y) => [
    s("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: "var(--soft)", "stroke-dasharray": "3 4" }),
    line(model.bins.filter(([count]) => count).map(([, score, precision]) => [x(score), y(precision)]), i),
    model.bins.filter(([count]) => count).map(([count, score, precision]) =>
      s("circle", { cx: x(score), cy: y(precision), r: 3 + 9 * Math.sqrt(count / most), fill: `var(--model${i})`, "fill-opacity": 0.45, stroke: `var(--model${i})` },
        s("title", {}, `${count} predictions with a mean score of ${score.toFixed(2)}: ${percent(precision)} % are right`))),
  ]);
}
