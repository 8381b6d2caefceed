"use strict";
// Draws the plots from the page's payload. Colours come from the style sheet, so that light, dark and print agree with it.
(() => {
  const host = document.getElementById("plots");
  if (!host) return;
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const height = 240;

  // Float32 from base64; what is no finite number becomes a gap.
  function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 4 }, (_, index) => {
      const value = view.getFloat32(index * 4, true);
      return Number.isFinite(value) ? value : null;
    });
  }

  const columns = Object.fromEntries(Object.entries(payload.columns).map(([name, text]) => [name, unpack(text)]));
  const scored = {
    step: payload.validation.step,
    loss: unpack(payload.validation.loss),
    accuracy: unpack(payload.validation.accuracy),
  };

  // Exponential mean without a bias at its start; it forgets over about a hundredth of the run, and wholly at a phase's end.
  const phaseStarts = new Set(payload.phases.map((phase) => phase.first));
  function smoothed(values) {
    const keep = 1 - 1 / Math.max(3, values.length / 100);
    let sum = 0, weight = 0;
    return values.map((value, index) => {
      if (phaseStarts.has(columns.step[index])) sum = weight = 0;
      if (value === null) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  const spread = (values) => {
    const known = values.filter((value) => value !== null && value > 0);
    return known.length ? known.reduce((a, b) => Math.max(a, b)) / known.reduce((a, b) => Math.min(a, b)) : 1;
  };
  const four = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());
  const percent = (value) => (value === null || value === undefined ? "–" : value.toFixed(1) + " %");
  const thousands = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });

  const plots = [
    {
      title: "Loss", unit: "nats per token", value: four,
      x: columns.step,
      series: [
        { label: "each step", values: columns.loss, stroke: "--blue-pale", width: 1 },
        { label: "smoothed", values: smoothed(columns.loss), stroke: "--blue", width: 2 },
      ],
      extra: scored.step.length ? { x: scored.step, label: "held-out", values: scored.loss, stroke: "--orange" } : null,
    },
    {
      title: "Gradient norm", unit: "L2, before clipping", value: four, log: spread(columns.gradNorm) > 100,
      x: columns.step,
      series: [
        { label: "each step", values: columns.gradNorm, stroke: "--blue-pale", width: 1 },
        { label: "smoothed", values: smoothed(columns.gradNorm), stroke: "--blue", width: 2 },
      ],
    },
    {
      title: "Learning rate", unit: "per step", value: (v) => (v === null || v === undefined ? "–" : v.toExponential(2)),
      tick: (v) => (v === 0 ? "0" : Number(v.toPrecision(3)).toExponential()), zero: true,
      x: columns.step,
      series: [{ label: "learning rate", values: columns.learningRate, stroke: "--blue", width: 2 }],
    },
    {
      title: "Throughput", unit: "tokens per second, no padding counted", value: thousands, tick: (v) => compact.format(v), zero: true,
      x: columns.step,
      series: [
        { label: "each step", values: columns.tokensPerSecond, stroke: "--blue-pale", width: 1 },
        { label: "smoothed", values: smoothed(columns.tokensPerSecond), stroke: "--blue", width: 2 },
      ],
    },
    {
      title: "Packing efficiency", unit: "% of what the ranks wait for", value: percent, share: true,
      x: columns.step,
      series: [
        { label: "best possible", values: columns.bound.map(times100), stroke: "--grey", width: 1.5, dash: [5, 4] },
        { label: "each step", values: columns.efficiency.map(times100), stroke: "--blue-pale", width: 1 },
        { label: "smoothed", values: smoothed(columns.efficiency).map(times100), stroke: "--blue", width: 2 },
      ],
    },
  ];
  if (scored.step.length) {
    plots.push({
      title: "Held-out accuracy", unit: "% of next tokens ranked first", value: percent, share: true,
      x: scored.step,
      series: [{ label: "accuracy", values: scored.accuracy.map(times100), stroke: "--orange", width: 2, points: true }],
    });
  }
  function times100(value) { return value === null ? null : value * 100; }

  function dataOf(plot) {
    const own = [plot.x, ...plot.series.map((series) => series.values)];
    return plot.extra ? uPlot.join([own, [plot.extra.x, plot.extra.values]]) : own;
  }

  // The first and the last step of all plots, so that they line up.
  const every = [...columns.step, ...scored.step];
  const first = every.reduce((a, b) => Math.min(a, b)), last = every.reduce((a, b) => Math.max(a, b));

  function shadePhases(u, colour) {
    if (payload.phases.length < 2) return;
    const { ctx, bbox } = u;
    const { pxRatio: unit } = uPlot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, 0, bbox.width, bbox.top + bbox.height);
    ctx.clip();
    payload.phases.forEach((phase, index) => {
      const left = u.valToPos(phase.first - 0.5, "x", true), right = u.valToPos(phase.last + 0.5, "x", true);
      if (index % 2) {
        ctx.fillStyle = colour("--band");
        ctx.fillRect(left, bbox.top, right - left, bbox.height);
      }
      const from = Math.max(left, bbox.left), room = Math.min(right, bbox.left + bbox.width) - from;
      ctx.fillStyle = colour("--soft");
      ctx.font = `${11 * unit}px sans-serif`;
      ctx.textAlign = "left";
      ctx.textBaseline = "bottom";
      if (ctx.measureText(phase.name).width + 4 * unit < room) ctx.fillText(phase.name, from + 2 * unit, bbox.top - 3 * unit);
    });
    ctx.restore();
  }

  function markEvents(u, colour) {
    const { ctx, bbox } = u, unit = uPlot.pxRatio, bottom = bbox.top + bbox.height;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 5 * unit, bbox.top, bbox.width + 10 * unit, bbox.height);
    ctx.clip();
    ctx.fillStyle = colour("--green");
    for (const step of payload.checkpoints) {
      const x = u.valToPos(step, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, bottom - 8 * unit);
      ctx.lineTo(x - 4 * unit, bottom);
      ctx.lineTo(x + 4 * unit, bottom);
      ctx.fill();
    }
    ctx.strokeStyle = colour("--red");
    ctx.lineWidth = unit;
    ctx.setLineDash([4 * unit, 3 * unit]);
    for (const step of payload.restarts) {
      const x = Math.round(u.valToPos(step - 0.5, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bottom);
      ctx.stroke();
    }
    ctx.restore();
  }

  const fromZero = (_, low, high) => [0, high > 0 ? high * 1.08 : 1];
  const withinHundred = (_, low, high) => {
    const room = Math.max(2, (high - low) * 0.1);
    return [Math.max(0, low - room), Math.min(100.1, high + room)];
  };

  function draw(plot, width, colour) {
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "11px sans-serif" };
    const series = plot.series.map((one) => ({
      label: one.label, stroke: colour(one.stroke), width: one.width, dash: one.dash, spanGaps: false,
      points: { show: one.points || one.values.length < 3, size: 6, fill: colour(one.stroke) },
      value: (_, value) => plot.value(value),
    }));
    if (plot.extra) {
      series.push({
        label: plot.extra.label, stroke: colour(plot.extra.stroke), width: 1.5, dash: [4, 4], spanGaps: true,
        points: { show: true, size: 7, fill: colour(plot.extra.stroke) }, value: (_, value) => plot.value(value),
      });
    }
    const range = plot.zero ? fromZero : plot.share ? withinHundred : undefined;
    const card = document.createElement("div");
    card.className = "plot";
    const title = document.createElement("h3");
    const small = document.createElement("small");
    small.textContent = plot.unit + (plot.log ? ", logarithmic" : "");
    title.append(plot.title + " ", small);
    card.append(title);
    host.append(card);
    return new uPlot({
      width, height, padding: [payload.phases.length > 1 ? 20 : 10, 14, 0, 0],
      scales: {
        x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { distr: plot.log ? 3 : 1, range },
      },
      series: [{ label: "at step", value: (_, value) => thousands(value) }, ...series],
      axes: [
        { ...axis, size: 42, label: "optimizer step", labelSize: 16, labelFont: "11px sans-serif", values: (_, ticks) => ticks.map((v) => (Number.isInteger(v) ? compact.format(v) : "")) },
        { ...axis, size: 58, ...(plot.tick ? { values: (_, ticks) => ticks.map((v) => (v === null ? "" : plot.tick(v))) } : {}) },
      ],
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 6 } },
      legend: { live: true },
      hooks: { drawClear: [(u) => shadePhases(u, colour)], draw: [(u) => markEvents(u, colour)] },
    }, dataOf(plot), card);
  }

  let drawn = [];
  const widthOf = (card) => Math.max(220, card.clientWidth - 24);

  function drawAll() {
    drawn.forEach((plot) => plot.destroy());
    host.replaceChildren();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    drawn = plots.map((plot) => draw(plot, 320, colour));
    fit();
    drawn.forEach((plot) => plot.setScale("x", { min: first, max: last }));
  }
  function fit() {
    for (const plot of drawn) {
      const width = widthOf(plot.root.parentElement);
      if (width !== plot.width) plot.setSize({ width, height });
    }
  }

  drawAll();
  document.documentElement.dataset.plots = String(drawn.length);
  new ResizeObserver(fit).observe(host);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
