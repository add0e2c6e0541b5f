'use strict';
// Everything that comes from a log goes through textContent or a chart: nothing is taken for HTML.

const COLORS = ['#3b7dd8', '#d1603d', '#4a9c5c', '#8a63b8', '#b8892b', '#2f9d9d', '#c05a86', '#7a7a7a'];
const SHOWN = [
  ['loss', 'loss, last 10', 4], ['val_loss', 'validation', 4], ['best_val_loss', 'best', 4],
  ['bits_per_byte', 'bits per byte', 3], ['tokens_per_sec', 'tokens/s', 0],
  ['mfu_percent', 'MFU %', 1], ['time_ms', 'ms per iteration', 0], ['memory_gb', 'memory GB', 2],
  ['data_wait_percent', 'waits for data %', 1], ['comm_wait_percent', 'waits for gradients %', 1],
  ['checkpoint_iter', 'last checkpoint', 0], ['checkpoint_stall_ms', 'waited for it, ms', 0], ['skipped', 'skipped', 0],
  ['expert_load', 'expert load', 0], ['cost', 'cost $', 2], ['cost_total', 'cost at the end $', 2],
];
const BUTTONS = ['toImage', 'zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d'];
const embedded = document.getElementById('data');
let data = null;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function digits(value, places) {
  return value.toLocaleString('en', { minimumFractionDigits: places, maximumFractionDigits: places });
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 100) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s % 86400 / 3600)} h`;
}

function card(run, number) {
  const n = run.numbers, made = element('article', undefined, 'card');
  const title = element('h2', run.name);
  title.style.color = COLORS[number % COLORS.length];
  title.append(element('span', run.why ? `${run.state}: ${run.why}` : run.state, `state ${run.state}`));
  made.append(title, element('div', run.architecture, 'soft'));
  if (n.iter !== undefined && n.max_iters) {
    const bar = element('progress');
    bar.max = n.max_iters;
    bar.value = n.iter;
    const left = n.left_s > 0 && run.state === 'running' ? `, ${duration(n.left_s)} left` : '';
    made.append(bar, element('div', `iteration ${digits(n.iter, 0)} of ${digits(n.max_iters, 0)}${left}`));
  }
  const list = element('dl');
  for (const [key, name, places] of SHOWN) {
    if (n[key] === undefined || key === 'skipped' && !n[key]) continue;
    list.append(element('dt', name), element('dd', digits(n[key], places)));
  }
  for (const gpu of run.gpus) list.append(element('dt', gpu.name), element('dd', gpu.text));
  if (run.machine) list.append(element('dt', 'machine'), element('dd', run.machine));
  made.append(list);
  for (const [step, text] of run.warnings) {
    made.append(element('div', `${digits(step, 0)}: ${text}`, 'warning'));
  }
  return made;
}

function smoothed(values, window) {
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= window ? values[i - window] : 0);
    return sum / Math.min(i + 1, window);
  });
}

function across(run, iters) {
  if (document.getElementById('across').value === 'iters') return iters;
  return iters.map(step => step * run.tokens_per_iter);
}

function chart(id, key, title) {
  const style = getComputedStyle(document.documentElement), traces = [];
  const soft = document.getElementById('smooth').checked;
  data.runs.forEach((run, number) => {
    const color = COLORS[number % COLORS.length], curve = run.curves[key];
    const x = across(run, curve.iters);
    const line = { color, width: 1.6 };
    if (soft && curve.values.length > 40) {
      traces.push({ x, y: curve.values, mode: 'lines', opacity: .25, line, hoverinfo: 'skip', showlegend: false });
      const window = Math.ceil(curve.values.length / 50);
      traces.push({ x, y: smoothed(curve.values, window), mode: 'lines', line, name: escaped(run.name) });
    } else {
      traces.push({ x, y: curve.values, mode: 'lines', line, name: escaped(run.name) });
    }
    const val = run.curves.val_loss;
    if (key === 'loss' && val.iters.length) {
      traces.push({
        x: across(run, val.iters), y: val.values, mode: 'lines+markers', name: `${escaped(run.name)} validation`,
        line: { color, width: 1.2, dash: 'dot' }, marker: { color, size: 6 },
      });
    }
  });
  const axis = { gridcolor: style.getPropertyValue('--line'), zeroline: false, automargin: true };
  const type = document.getElementById('log-x').checked ? 'log' : 'linear';
  const where = document.getElementById('across').value;
  Plotly.react(id, traces, {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: style.getPropertyValue('--text') }, margin: { l: 10, r: 10, t: 32, b: 10 },
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: style.getPropertyValue('--soft') },
    hovermode: 'x unified', hoverlabel: { bgcolor: style.getPropertyValue('--card') },
    uirevision: `${key} ${type} ${where}`,  // a zoom outlives new data
    legend: { orientation: 'h', y: -.3 }, showlegend: traces.length > 1,
    xaxis: { ...axis, type, title: { text: where === 'iters' ? 'iteration' : 'tokens' } },
    yaxis: { ...axis, title: { text: title } },
  }, { responsive: true, displaylogo: false, scrollZoom: true, modeBarButtons: [BUTTONS] });
}

function escaped(text) {  // plotly knows some tags in names
  return text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
}

function differences() {
  const place = document.getElementById('differences'), table = place.querySelector('table');
  place.hidden = !data.differences.length;
  const head = element('tr');
  head.append(element('th', ''), ...data.runs.map(run => element('th', run.name)));
  table.replaceChildren(head, ...data.differences.map(([key, values]) => {
    const row = element('tr');
    row.append(element('th', key), ...values.map(value => element('td', value)));
    return row;
  }));
}

function logs() {
  const place = document.getElementById('logs');
  data.runs.forEach((run, number) => {
    if (place.children[number]) return;
    const made = element('details'), text = element('pre');
    made.append(element('summary', `log and samples of ${run.name}`), text);
    made.addEventListener('toggle', () => made.open && fill(text, number));
    place.append(made);
  });
}

async function fill(place, number) {
  const text = embedded ? data.runs[number].log : await (await fetch(`log?run=${number}`)).text();
  if (text === place.textContent) return;
  place.textContent = text;
  place.scrollTop = place.scrollHeight;
}

function draw() {
  if (!data) return;
  document.getElementById('runs').replaceChildren(...data.runs.map(card));
  chart('loss', 'loss', 'nats per token');
  const second = document.getElementById('second');
  chart('other', second.value, second.selectedOptions[0].textContent);
  differences();
  logs();
}

async function look() {
  const fresh = document.getElementById('fresh');
  try {
    const answer = await fetch('runs');
    if (!answer.ok) throw new Error(await answer.text());
    data = await answer.json();
    draw();
    document.querySelectorAll('#logs details').forEach((made, number) => {
      if (made.open) fill(made.querySelector('pre'), number);
    });
    fresh.textContent = `as of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    fresh.textContent = `no answer: is watch.py still running? (${error.message})`;
  }
  setTimeout(look, 1000 * (data ? data.refresh : 2));
}

for (const id of ['across', 'log-x', 'smooth', 'second']) {
  document.getElementById(id).addEventListener('change', draw);
}
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
if (embedded) {
  data = JSON.parse(embedded.textContent);
  document.getElementById('fresh').textContent = `as of ${data.time}`;
  draw();
} else {
  look();
}
