/* Everything above the videos: evaluation, errors, classes, calibration. */
function showHead() {
  document.getElementById("title").textContent = DATA.title;
  const events = DATA.support.reduce((sum, count) => sum + count, 0);
  document.getElementById("subtitle").append(
    `Subset ${DATA.subset}: ${DATA.total} videos, ${events} annotated events of ${DATA.classes.length} classes. `,
    ...DATA.models.map((model, i) => [modelName(i), ` (${model.source}): ${model.predictions} predictions` +
      (model.missing ? `, ${model.missing} videos without` : "") + ". "]).flat());
}

function showEvaluation() {
  const difference = (values) => (TWO ? [h("tr", {}, h("td", {}, "B − A"), values.map((value) => h("td", {}, signed(value))))] : []);
  const [first, second] = DATA.models;
  const at = (model) => [...DATA.reported.map((t) => model.map[DATA.tiou.indexOf(t)]), model.average];
  show("map", h("div", { class: "scroll" }, h("table", {},
    h("caption", {}, "mAP in percent at tIoU thresholds; Avg. over 0.1:0.1:0.9"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "tIoU"), DATA.reported.map((t) => h("th", { scope: "col" }, String(t))), h("th", { scope: "col" }, "Avg."))),
    h("tbody", {}, DATA.models.map((model, i) => h("tr", {}, h("td", {}, modelName(i)), at(model).map((value) => h("td", {}, percent(value))))),
      TWO ? difference(at(second).map((value, k) => value - at(first)[k])) : null))));
  show("buckets", h("div", { class: "scroll" }, h("table", {},
    h("caption", {}, `Events found (tIoU > ${DATA.bucketTiou}, right class) in percent, by duration (Fig. 3 of the paper)`),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "duration"), h("th", { scope: "col" }, "events"), DATA.models.map((_, i) => h("th", { scope: "col" }, modelName(i))))),
    h("tbody", {}, first.buckets.map(([above, upTo, events], k) => h("tr", {}, h("td", {}, upTo === null ? `above ${above} s` : `(${above}, ${upTo}] s`), h("td", {}, String(events)),
      DATA.models.map((model, i) => { const found = model.buckets[k][3]; return h("td", {}, events ? percent(found / events) : "–", bar(events ? found / events : 0, `--model${i}`)); })))))));
}

function showCosts() {
  const largest = Math.max(...DATA.models.flatMap((model) => model.errors.map((error) => error.gains[AT])), 0.001);
  const order = DATA.models[0].errors.map((_, k) => k).sort((a, b) => DATA.models[0].errors[b].gains[AT] - DATA.models[0].errors[a].gains[AT]);
  show("costs", h("p", { class: "soft" }, `The cost of a kind of error is the gain in mAP points when that kind alone is mended, measured by evaluating again; the costs do not add up. ` +
    `Cases are predictions with at least the working score, that of the best F1 at tIoU ${DATA.at}: `,
    DATA.models.map((model, i) => [i ? "; " : "", TWO ? `${LETTERS[i]} ` : "", `${model.score.toFixed(2)} (precision ${percent(model.precision)} %, recall ${percent(model.recall)} %)`]), "."),
  h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, TWO ? h("tr", {}, h("th", {}), DATA.models.map((_, i) => h("th", { colspan: 3, scope: "colgroup" }, modelName(i)))) : null,
      h("tr", {}, h("th", { scope: "col" }, "kind"), DATA.models.map(() => [h("th", { scope: "col" }, "cases"), h("th", { scope: "col" }, `cost at ${DATA.at}`), h("th", { scope: "col" }, "cost, Avg.")]))),
    h("tbody", {}, order.map((k) => { const kind = DATA.models[0].errors[k].kind; return h("tr", { "data-kind": kind },
      h("td", { title: MEANING[kind] }, swatch(kind), kind),
      DATA.models.map((model) => { const error = model.errors[k]; return [h("td", {}, String(error.cases)),
        h("td", {}, points(error.gains[AT]), bar(error.gains[AT] / largest, KINDS[kind].color)), h("td", {}, points(mean(error.gains)))]; })); })))),
  h("details", {}, h("summary", {}, "What the kinds mean"), h("ul", {}, Object.entries(MEANING).map(([kind, text]) => h("li", {}, h("span", { class: "name" }, kind), `: ${text}`)))));
}

/* What the cases have in common: shares of each kind beside those of all annotated events. */
function showTraits() {
  const chosen = h("select", { "aria-label": "Model", onchange: draw }, DATA.models.map((model, i) => h("option", { value: i }, TWO ? `${LETTERS[i]}: ${model.name}` : model.name)));
  const place = h("div", { class: "columns three" });
  function row(name, counts) {
    const total = counts.reduce((sum, count) => sum + count, 0);
    if (!total) return [];
    return [h("div", {}, name, h("span", { class: "soft" }, ` (${total})`)), h("div", { class: "track", role: "img", "aria-label": `${name}: ${counts.join(", ")}` },
      counts.map((count, k) => (count ? h("span", { class: `shade${k}`, style: `flex: ${count}`, title: `${count} of ${total}` }, count / total > 0.08 ? `${Math.round(100 * count / total)} %` : "") : null)))];
  }
  function draw() {
    const errors = DATA.models[Number(chosen.value)].errors;
    place.replaceChildren(...Object.entries(DATA.traits).map(([name, trait]) => h("figure", { "data-trait": name },
      h("h3", {}, { duration: "Duration", overlap: "Overlap with other events", position: "Position in the video" }[name] || name),
      h("div", { class: "key" }, trait.values.map((value, k) => h("span", {}, h("span", { class: `shade${k}` }), value))),
      h("div", { class: "stack" }, row("all annotated", trait.all), errors.map((error) => row(error.kind, error.traits[name]))))));
  }
  draw();
  show("traits", h("h3", {}, "What the cases have in common"), TWO ? h("div", { class: "tools screen" }, chosen) : null,
    h("p", { class: "soft" }, "Of an error about an annotated event, that event; of background, the predicted one. A share far from that of all annotated events is a hint."), place);
}

function showClasses() {
  const state = { key: "events", descending: true, at: "average", chosen: DATA.support.indexOf(Math.max(...DATA.support)) };
  const ap = (model, index) => { const row = DATA.models[model].ap[index]; return row === null ? null : (state.at === "average" ? mean(row) : row[Number(state.at)]) / 1000; };
  const keys = { class: (i) => DATA.classes[i], events: (i) => DATA.support[i] };
  DATA.models.forEach((_, m) => { keys[`ap${m}`] = (i) => ap(m, i); });
  if (TWO) keys.difference = (i) => (ap(0, i) === null ? null : ap(1, i) - ap(0, i));
  const threshold = h("select", { id: "apat", onchange: () => { state.at = threshold.value; draw(); } },
    h("option", { value: "average" }, "Avg."), DATA.tiou.map((t, k) => h("option", { value: k }, String(t))));
  const table = h("div", { class: "scroll tall" });
  const select = h("select", { id: "curveof", onchange: () => { state.chosen = Number(select.value); draw(); } }, DATA.classes.map((name, i) => h("option", { value: i }, name)));
  const figure = h("figure", {});
  function head(key, name) {
    const sorted = state.key === key;
    return h("th", { scope: "col", "aria-sort": sorted ? (state.descending ? "descending" : "ascending") : null, "data-key": key },
      h("button", { onclick: () => { state.descending = sorted ? !state.descending : key !== "class"; state.key = key; draw(); table.querySelector(`[data-key="${key}"] button`).focus(); } }, name, sorted ? (state.descending ? " ↓" : " ↑") : ""));
  }
  function draw() {
    const value = keys[state.key];
    const order = DATA.classes.map((_, i) => i).sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const before = typeof x === "string" ? x.localeCompare(y) : x - y;
      return state.descending ? -before : before;
    });
    table.replaceChildren(h("table", { id: "classtable" }, h("thead", {}, h("tr", {}, head("class", "class"), head("events", "events"),
      DATA.models.map((model, m) => head(`ap${m}`, TWO ? `AP ${LETTERS[m]}` : "AP")), TWO ? head("difference", "B − A") : null)),
    h("tbody", {}, order.map((i) => h("tr", { class: i === state.chosen ? "chosen" : null }, h("td", {}, h("button", { class: "link", title: "show its curve", onclick: () => { state.chosen = i; draw(); } }, DATA.classes[i])),
      h("td", {}, String(DATA.support[i])), DATA.models.map((_, m) => h("td", {}, percent(ap(m, i)), bar(ap(m, i) || 0, `--model${m}`))), TWO ? h("td", {}, keys.difference(i) === null ? "–" : signed(keys.difference(i))) : null)))));
    select.value = state.chosen;
    figure.replaceChildren(precisionRecall(state.chosen), h("figcaption", {}, `${DATA.classes[state.chosen]}: ${DATA.support[state.chosen]} events, AP at ${DATA.at} `,
      DATA.models.map((model, m) => [m ? ", " : "", TWO ? `${LETTERS[m]} ` : "", model.ap[state.chosen] === null ? "–" : percent(model.ap[state.chosen][AT] / 1000)])));
  }
  draw();
  show("perclass", h("div", { class: "tools screen" }, h("label", {}, "AP at tIoU ", threshold)), table);
  show("curves", h("div", { class: "tools screen" }, h("label", {}, `Precision and recall at ${DATA.at} of `, select)), TWO ? h("p", {}, DATA.models.map((_, m) => [modelName(m), " "])) : null, figure);
}

function showCalibration() {
  show("reliability", DATA.models.map((model, i) => h("figure", {}, h("div", {}, modelName(i)), reliability(model, i),
    h("figcaption", {}, `Mean distance of score and precision (ECE): ${percent(model.calibration)} points. Below the dotted line scores promise too much.`))));
}
